"""Lay out the local page of `dlr-clip serve` with gradio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dassl.utils import InputError

from .serving import PhotoServer, answers_html, names_in, require_gradio

CSS = """
.photo { margin: 0 0 1.2rem; overflow-wrap: anywhere; }
.bar { position: relative; height: 1.7rem; margin: 0.2rem 0; background: #f1f2f4; color: #1a1a1a; }
.bar span { position: absolute; inset: 0 auto 0 0; }
.bar label { position: absolute; left: 0.5rem; line-height: 1.7rem; }
.bar em { position: absolute; right: 0.5rem; line-height: 1.7rem; font-style: normal; }
"""


def build_page(server: PhotoServer, title: str) -> Any:
    """Return the page as gradio's Blocks: photos to drop, their classes as bars, heads, other names, corrections.

    Raises:
        InputError: gradio is not installed.
    """
    gradio = require_gradio()

    def shown(path: str) -> str:
        return Path(path).name

    def ask(files: list[str] | None, head: str, text: str) -> tuple[str, list[str], Any]:
        paths = [str(file) for file in files or ()]
        answers = server.answer(paths, head, names_in(text)) if paths else []
        choices = [(shown(path), path) for path in paths]
        which = gradio.Dropdown(choices=choices, value=paths[0] if paths else None)
        return answers_html(answers, {path: shown(path) for path in paths}), paths, which

    def correct(path: str | None, name: str | None) -> str:
        if not path or not name:
            return "Choose a photo and its class."
        try:
            return f"Saved: {server.correct(path, name)}"
        except InputError as error:
            return str(error)

    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        gradio.Markdown(f"# {title}")
        with gradio.Row():
            with gradio.Column():
                files = gradio.File(label="Photos", file_count="multiple", file_types=["image"], elem_id="photos")
                gallery = gradio.Gallery(label="Photos", columns=4, height=220, show_label=False)
                head = gradio.Dropdown(server.heads, value=server.heads[0], label="Classifier")
                names = gradio.Textbox(
                    label="Other class names, with commas between them", info="zero-shot CLIP then answers"
                )
            with gradio.Column():
                answers = gradio.HTML(answers_html([], {}), elem_id="answers")
                with gradio.Accordion("Correct an answer", open=False):
                    gradio.Markdown(f"The photo is copied to `{server.corrections}`, for the next training.")
                    photo = gradio.Dropdown([], label="Photo")
                    right = gradio.Dropdown(server.model.names, label="Its class", allow_custom_value=True)
                    save = gradio.Button("Save")
                    said = gradio.Textbox(label="", show_label=False, interactive=False, elem_id="said")
        for changed in (files.change, head.change, names.submit):
            changed(ask, [files, head, names], [answers, gallery, photo], api_name=False)
        save.click(correct, [photo, right], said, api_name=False)
    return page


def launch(page: Any, port: int | None, block: bool = True) -> Any:
    """Serve the page on this machine alone, and return what gradio returns."""
    gradio = require_gradio()
    plain = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no fonts from the network
    return page.queue().launch(
        server_name="127.0.0.1", server_port=port, share=False, quiet=True, prevent_thread_lock=not block, css=CSS,
        theme=plain, footer_links=[],
    )  # fmt: skip
