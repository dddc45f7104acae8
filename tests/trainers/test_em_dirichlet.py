import pytest
import torch

from trainers.base.transductive import draw_tasks
from trainers.em_dirichlet import (
    DirichletLearner,
    dirichlet_log_likelihood,
    em_dirichlet,
    fit_dirichlet,
    match_clusters,
)


def data(num_classes=4, n=60, seed=0):
    """Probabilities [n, C] around the classes, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (n,), generator=generator)
    logits = torch.randn(n, num_classes, generator=generator) + 2.0 * torch.eye(num_classes)[labels]
    return (1.5 * logits).softmax(1), labels


def test_log_likelihood_is_torch_s():
    z, _ = data()
    alpha = 0.2 + 3 * torch.rand(4, 4)
    want = torch.stack([torch.distributions.Dirichlet(a).log_prob(z) for a in alpha], dim=1)
    torch.testing.assert_close(dirichlet_log_likelihood(z.log(), alpha), want, rtol=1e-4, atol=1e-4)


def test_fit_is_the_maximum_and_every_step_goes_up():
    z, labels = data(n=200)
    statistic = torch.stack([z[labels == c].double().log().mean(0) for c in range(4)])

    def likelihood(alpha):
        return (alpha.sum(1).lgamma() - alpha.lgamma().sum(1) + ((alpha - 1) * statistic).sum(1)).sum()

    alpha, last = torch.ones(4, 4, dtype=torch.float64), -float("inf")
    for _ in range(50):
        alpha = fit_dirichlet(alpha, statistic, iterations=1)
        assert float(likelihood(alpha)) >= last
        last = float(likelihood(alpha))
    best = fit_dirichlet(torch.ones(4, 4, dtype=torch.float64), statistic, 5000, 1e-20)
    gradient = best.sum(1, keepdim=True).digamma() - best.digamma() + statistic
    torch.testing.assert_close(gradient, torch.zeros(4, 4, dtype=torch.float64), rtol=0, atol=1e-6)


def naive_em(z, strength, hard, supports=None, labels=None, turns=3):
    """Turn by turn and number by number; the inner maximum by gradient ascent in ln alpha."""
    q, c = z.shape
    z, log = z.double(), z.double().log()
    u = z  # also where assignments are hard: the first Dirichlets are fitted to the soft ones
    every = log if supports is None else torch.cat([log, supports.double().log()])
    for _ in range(turns):
        weights = u if supports is None else torch.cat([u, torch.eye(c, dtype=torch.float64)[labels]])
        rows = []
        for k in range(c):
            mean = sum(w * x for w, x in zip(weights[:, k], every, strict=True)) / weights[:, k].sum()
            a = torch.zeros(c, dtype=torch.float64, requires_grad=True)
            optim = torch.optim.LBFGS(
                [a], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
            )

            def loss(a=a, mean=mean, optim=optim):
                optim.zero_grad()
                alpha = a.exp()
                value = -(alpha.sum().lgamma() - alpha.lgamma().sum() + ((alpha - 1) * mean).sum())
                value.backward()
                return value

            optim.step(loss)
            rows.append(a.detach().exp())
        share = u.mean(0)
        scores = torch.stack([torch.distributions.Dirichlet(a).log_prob(z) for a in rows], 1) + strength * share.log()
        u = torch.eye(c, dtype=torch.float64)[scores.argmax(1)] if hard else scores.softmax(1)
    return u


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("few_shot", [False, True])
def test_against_naive(hard, few_shot):
    z, _ = data(3, 30)
    supports, labels = data(3, 9, seed=1)
    given = (supports, labels) if few_shot else (None, None)
    got = em_dirichlet(z, *given, strength=1.0, hard=hard, iterations=3, mm_iterations=20000, tolerance=1e-20)
    torch.testing.assert_close(got.assignments, naive_em(z, 1.0, hard, *given), rtol=1e-5, atol=1e-5)


def test_the_hard_variant_starts_from_soft_assignments():
    """Its first Dirichlets are those of the soft variant; a one-hot start has others."""
    z, _ = data(3, 30)
    soft, hard = (em_dirichlet(z, strength=1.0, hard=hard, iterations=1) for hard in (False, True))
    assert torch.equal(soft.alpha, hard.alpha)
    one_hot = torch.eye(3, dtype=torch.float64)[z.argmax(1)]
    statistic = one_hot.t() @ z.double().log() / one_hot.sum(0)[:, None]
    assert not torch.allclose(fit_dirichlet(torch.ones(3, 3, dtype=torch.float64), statistic), hard.alpha, rtol=0.05)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("few_shot", [False, True])
@pytest.mark.parametrize("strength", [0.0, 1.0, 5.0])
def test_objective_never_increases(hard, few_shot, strength):
    for seed in range(3):
        z, _ = data(6, 50, seed)
        given = data(6, 24, seed + 10) if few_shot else (None, None)
        trace = em_dirichlet(z, *given, strength=strength, hard=hard, iterations=15).objective
        assert len(trace) == 30
        assert all(after <= before + 1e-9 * abs(before) for before, after in zip(trace, trace[1:], strict=False))


def test_a_class_without_images_and_probabilities_of_zero():
    z = torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [1.0, 0, 0]])
    for hard in (False, True):
        found = em_dirichlet(z, strength=1.0, hard=hard)
        assert torch.isfinite(found.log_scores).all() and torch.isfinite(found.alpha).all()


def test_matching_is_the_arg_max_where_it_can_be():
    alpha = torch.tensor([[1.0, 9.0, 1.0], [9.0, 1.0, 1.0], [1.0, 1.0, 2.0]])
    everyone = torch.eye(3)
    assert match_clusters(alpha, everyone).tolist() == [1, 0, 2]
    clash = torch.tensor([[5.0, 4.0, 1.0], [9.0, 1.0, 1.0], [1.0, 1.0, 2.0]])  # two clusters look like class 0
    assert match_clusters(clash, everyone).tolist() == [1, 0, 2]
    assert match_clusters(alpha, everyone[:1]).tolist() == [1, 0, 2]  # empty clusters take what is left
    assert sorted(match_clusters(clash, everyone[1:]).tolist()) == [0, 1, 2]


def test_tasks():
    labels = torch.arange(200) % 10
    tasks = draw_tasks(labels, 30, 3, 7, seed=1)
    assert tasks == draw_tasks(labels, 30, 3, 7, seed=1) != draw_tasks(labels, 30, 3, 7, seed=2)
    assert len(tasks) == 7
    for task in tasks:
        assert len(set(task)) == 30
        assert len(set(labels[task].tolist())) <= 3
    with pytest.raises(ValueError, match="at most 60 images"):
        draw_tasks(labels, 75, 3, 1, seed=1)
    with pytest.raises(ValueError, match="at most 10 classes"):
        draw_tasks(labels, 5, 11, 1, seed=1)


@pytest.mark.parametrize("use_supports", [False, True])
def test_learner_gives_log_probabilities_of_classes(make_clip, names, use_supports):
    def unit(*shape):
        return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(3)), dim=1)

    learner = DirichletLearner(
        make_clip(), names, unit(5, 24), n=10 if use_supports else 0, use_supports=use_supports, temperature=30.0,
        effective=2, hard=False, iterations=5, mm_iterations=100,
    )  # fmt: skip
    assert learner.strength == 2.0  # floor(5 / 2)
    if use_supports:
        learner.supports.copy_(unit(10, 24))
        learner.support_labels.copy_(torch.arange(10) % 5)
    features = unit(20, 24)
    torch.testing.assert_close(
        learner.simplex(features), (30 * features @ learner.zeroshot.t()).exp()
        / (30 * features @ learner.zeroshot.t()).exp().sum(1, keepdim=True),
    )  # fmt: skip
    logits = learner(features)
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(20))


@pytest.mark.parametrize("supports", [False, True])
def test_tasks_of_a_run(tmp_path, random_tiny, supports):
    import json
    from pathlib import Path

    import datasets
    import trainers
    from dassl.config import get_cfg_default
    from dassl.engine import build_trainer

    def build(*pairs):
        cfg = get_cfg_default()
        datasets.extend_cfg(cfg)
        trainers.extend_cfg(cfg)
        root = Path(trainers.__file__).parents[1]
        cfg.merge_from_file(root / "configs" / "trainers" / "em_dirichlet" / "tiny.yaml")
        cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path), "DATASET.NAME", "Digits", "DATASET.NUM_SHOTS", 1, "SEED", 1])
        cfg.merge_from_list(["MODEL.BACKBONE.WEIGHTS", str(random_tiny), "USE_CUDA", False])
        node = "TRAINER.EMDIRICHLET."
        cfg.merge_from_list([f"{node}SUPPORTS", supports, f"{node}NUM_TASKS", 3, f"{node}ITER_MM", 20, *pairs])
        return build_trainer(cfg)

    trainer = build("TRAINER.EMDIRICHLET.TASK_SIZE", 75)
    assert trainer.network.learner.options["iterations"] == 20
    hard = build("TRAINER.EMDIRICHLET.HARD", True).network.learner.options
    assert (hard["hard"], hard["iterations"]) == (True, 10)
    assert build("TRAINER.EMDIRICHLET.ITER", 3).network.learner.options["iterations"] == 3
    assert trainer.get_model_names() == (["em_dirichlet"] if supports else [])
    trainer.train()
    results = json.loads((tmp_path / "metrics.json").read_text())
    assert results["test"]["n"] == 225 and list(results["test"]["heads"]) == ["clip", "em"]
    with pytest.raises(ValueError, match="Expected tasks of at most"):
        build("TRAINER.EMDIRICHLET.TASK_SIZE", 5000)
