"""Names, where weights are looked for, and downloads (from a server on this machine)."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch

from trainers.clip import BACKBONES, check_backbone, load_clip
from trainers.clip.backbones import OPENAI, resolve_backbone
from trainers.clip.sources import HubSource, UrlSource, download


@pytest.mark.parametrize("name", OPENAI)
def test_openai_backbones_have_a_full_checksum_and_quick_gelu(name):
    backbone = resolve_backbone(name)
    url = backbone.sources[0]
    assert isinstance(url, UrlSource) and len(url.sha256) == 64
    assert url.filename == name.replace("/", "-") + ".pt"
    assert backbone.arch["quick_gelu"] is True


def test_open_clip_backbones():
    laion = resolve_backbone("open_clip:ViT-B-32/laion2b_s34b_b79k")
    assert laion.arch["quick_gelu"] is False
    assert laion.sources == (HubSource("laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),)
    assert resolve_backbone("open_clip:ViT-B-32/openai").arch["quick_gelu"] is True  # the weights decide
    assert resolve_backbone("open_clip:ViT-L-14/laion2b_s32b_b82k").pixel_mean == (0.5, 0.5, 0.5)
    assert not resolve_backbone("open_clip:ViT-B-32").sources
    assert UrlSource.from_url("https://host/v0.2/rn50-quickgelu-yfcc15m-455df137.pt").sha256 == "455df137"
    assert UrlSource.from_url("https://host/b32_400m.pt").sha256 == ""


def test_resolving_leaves_open_clips_tables_alone():
    resolve_backbone("open_clip:ViT-B-32/openai")
    assert "quick_gelu" not in open_clip.get_model_config("ViT-B-32")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_b16", "did you mean 'ViT-B/16'"),
        ("RN51", "did you mean 'RN50'"),
        ("Tiny", "did you mean 'tiny'"),
        ("", "Expected the backbone to be one of"),
        ("open_clip:ViT-B-33/openai", "did you mean 'ViT-B-32'"),
        ("open_clip:ViT-B-32/open_ai", "did you mean 'openai'"),
        ("open_clip:ViT-B-16-SigLIP/web", "did you mean 'webli'"),
        ("open_clip:ViT-B-16-SigLIP", "to have a pretrained tag"),
        ("open_clip:ViT-B-32", "Expected 'open_clip:ViT-B-32' to have a pretrained tag"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError) as caught:
        check_backbone(name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "name", [*OPENAI, "open_clip:ViT-B-32/laion2b_s34b_b79k", "open_clip:EVA02-B-16/merged2b_s8b_b131k"]
)
@pytest.mark.parametrize("function", [check_backbone, load_clip])
def test_without_weights_and_network_the_error_says_what_to_fetch(nowhere, name, function):
    with pytest.raises(FileNotFoundError) as caught:
        function(name)
    message = str(caught.value)
    assert "\n" not in message and "MODEL.BACKBONE.WEIGHTS" in message and "https://" in message
    if name in OPENAI:
        source = resolve_backbone(name).sources[0]
        assert source.url in message and source.sha256 in message and str(nowhere / source.filename) in message


def test_every_backbone_is_resolvable():
    for name in BACKBONES:
        assert resolve_backbone(name).name == name


def test_a_cached_file_is_used_and_a_damaged_one_is_not(nowhere, caplog):
    nowhere.mkdir(parents=True)
    path = nowhere / "ViT-B-32.pt"
    torch.save({"x": torch.ones(1)}, path)
    check_backbone("ViT-B/32")  # cheap: it is there
    with pytest.raises(FileNotFoundError, match="switched off"):
        load_clip("ViT-B/32")
    assert "has not the checksum" in caplog.text
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert UrlSource("https://nowhere.invalid/ViT-B-32.pt", digest[:8]).fetch() == path


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, bytes]]:
    """(URL, content) of a file served from this machine."""
    content = bytes(range(256)) * 5000

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200 if "weights" in self.path else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            if "weights" in self.path:
                self.wfile.write(content[:1000] if "broken" in self.path else content)

        def log_message(self, *args: object) -> None:
            pass

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("DLR_CLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/", content
        httpd.shutdown()
        thread.join()


def test_download(server, tmp_path):
    base, content = server
    source = UrlSource(base + "weights.pt", hashlib.sha256(content).hexdigest())
    assert source.cached() is None and source.reachable()
    path = source.fetch()
    assert path == tmp_path / "cache" / "clip" / "weights.pt" == source.cached()
    assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == ["weights.pt"]
    assert not UrlSource(base + "absent.pt", "").reachable()


def test_a_wrong_checksum_or_a_broken_connection_leaves_nothing(server, tmp_path):
    base, content = server
    target = tmp_path / "weights.pt"
    with pytest.raises(ValueError, match="to have sha256 00ff but got .*not kept"):
        download(base + "weights.pt", target, "00ff")
    with pytest.raises(OSError, match=r"1000 of 1280000|IncompleteRead|1000 bytes read"):
        download(base + "broken_weights.pt", target, hashlib.sha256(content).hexdigest())
    assert not list(tmp_path.iterdir())
    target.write_bytes(b"what was there")
    with pytest.raises(OSError):
        download(base + "absent.pt", target, "")
    assert target.read_bytes() == b"what was there"
