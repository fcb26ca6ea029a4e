"""Draw the loss of a training by step into loss.png (matplotlib is imported when it draws)."""

from gemma_tune.reporting.charts import points_of, smoothed
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.metrics_log import read_metrics


def draw_loss_curve(run: RunDir) -> None:
    """Write `run.loss_curve` from metrics.jsonl; losses are in nats a supervised token."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    metrics = read_metrics(run)
    losses, eval_losses = points_of(metrics, "loss"), points_of(metrics, "eval_loss")
    figure = Figure(figsize=(7, 4), dpi=130, layout="constrained")
    axes = figure.subplots()
    curves = [
        (losses, "-", "#9bb8e8", 1, "training loss"),
        (smoothed(losses), "-", "#1a56c4", 2, "training loss, smoothed"),
        *([(eval_losses, "o-", "#d1495b", 1.5, "eval loss")] if eval_losses else []),
    ]
    for points, form, colour, width, label in curves:
        axes.plot([x for x, _ in points], [y for _, y in points], form, color=colour, linewidth=width, label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per supervised token)")
    axes.set_ylim(bottom=0)
    axes.set_title(run.name)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(run.loss_curve)
