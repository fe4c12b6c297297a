"""The footnotes of the demo's table: what its numbers are, and are not."""

from __future__ import annotations

from fastkfo.cli.demo_methods import FEATURES, Run, Settings

__all__ = ["footnotes"]

DEFAULTS = (
    " How the defaults came about: the rates by a small grid on the reverse split (training on "
    "digits 5-9), where they suit both kinds of MAML and KFO did better with an inner rate of 1; "
    "300 iterations because training for 1000 lowered the accuracy on unseen digits, on this split "
    "too, and changed the order of the methods; the CNN among three models because the methods "
    "differ on it, while plain MAML was as good or better with a linear model and level with KFO "
    "with an MLP. Seeds differ by more than the interval (MAML and MAML-KFO were level for two of "
    "the three we ran)."
)


def footnotes(runs: list[Run], settings: Settings, signal_name: str | None) -> list[str]:
    """Says what the table's numbers are, and are not.

    Args:
        runs: All methods, finished or not.
        settings: The demo's options.
        signal_name: The signal that cut the run short, or None.

    Returns:
        One paragraph each.
    """
    tested = 0 if runs[0].test is None else len(runs[0].test)
    accuracies = runs[0].best_known()
    count = 0 if accuracies is None else len(accuracies)
    rounds = min(len(run.differences) for run in runs)
    splits = (
        "Training: digits 0-4 of scikit-learn's 8x8 images, each at four rotations by 90 degrees "
        "as classes of their own. Test: digits 5-9, upright; their tasks differ in images and "
        "label order, not in digits, so the interval says nothing about other digits or seeds."
    )
    notes = [
        f"Accuracy: mean and 95 % interval over {count} {'test' if tested else 'validation'} "
        f"tasks of one training run (seed {settings.seed}). {splits}"
        if count
        else f"Nothing had been measured yet. {splits}",
        f"MAML + linear: {settings.extra_layers} linear layers of {FEATURES} units, with no "
        "non-linearity, before the head; it can express no more than MAML's model. MAML-KFO: the "
        "same model as MAML, its gradients transformed by learned Kronecker factors (psd).",
        "All methods share seed, tasks, iterations, and inner and meta learning rate."
        + (DEFAULTS if settings == _with_defaults(settings) else ""),
    ]
    if rounds:
        notes.append(
            f"Time: one meta-gradient of {settings.meta_batch} tasks with {settings.steps} inner "
            f"steps, without the optimizer's step; medians of {rounds} interleaved rounds on "
            f"{settings.threads} thread{'s' * (settings.threads > 1)}; the ratio is the median of "
            "the rounds' plain/fastkfo. Gradient difference: float32, the largest of |fastkfo - "
            "plain| / |plain| (2-norms) over parameters, transform factors and rounds."
        )
    if count and tested < settings.test_tasks and signal_name:
        notes.append(
            f"† The test had not started when {signal_name} came: the last validation instead."
            if not tested
            else f"The test was cut short by {signal_name}: {tested} of {settings.test_tasks} "
            "tasks."
        )
    for run in runs:
        if run.failure:
            notes.append(f"‡ {run.name} stopped training at {run.failure}.")
        if run.not_finite:
            notes.append(f"‡ {run.name}: predictions not finite in {run.not_finite} test tasks.")
    return notes


def _with_defaults(settings: Settings) -> Settings:
    """Takes the default of every setting that changes what is learned, but the seed."""
    kept = ("minutes", "out", "seed", "test_tasks", "valid_tasks", "rounds", "threads")
    return Settings(**{name: getattr(settings, name) for name in kept})
