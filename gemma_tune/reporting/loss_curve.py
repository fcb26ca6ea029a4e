"""The picture of a training: loss by step (matplotlib is imported when it draws)."""

from __future__ import annotations

from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.record import read_metrics


def draw_loss_curve(run: RunDir) -> None:
    """Write `run.loss_curve` from metrics.jsonl; losses are in nats a supervised token."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    metrics = read_metrics(run)
    train = [(row["step"], row["loss"]) for row in metrics if row.get("loss") is not None]
    evaluation = [(row["step"], row["eval_loss"]) for row in metrics if row.get("eval_loss") is not None]
    figure = Figure(figsize=(7, 4), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [step for step, _ in train], [loss for _, loss in train], color="#9bb8e8", linewidth=1, label="training loss"
    )
    smooth = exponential_mean([loss for _, loss in train])
    axes.plot([step for step, _ in train], smooth, color="#1a56c4", linewidth=2, label="training loss, smoothed")
    if evaluation:
        axes.plot(
            [step for step, _ in evaluation], [loss for _, loss in evaluation], "o-", color="#d1495b", label="eval loss"
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per supervised token)")
    axes.set_ylim(bottom=0)
    axes.set_title(run.name)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(run.loss_curve)


def exponential_mean(values: list[float], *, decay: float = 0.9) -> list[float]:
    """Exponential moving mean, corrected for its start as Adam's moments are."""
    smooth, mean = [], 0.0
    for count, value in enumerate(values, start=1):
        mean = decay * mean + (1 - decay) * value
        smooth.append(mean / (1 - decay**count))
    return smooth
