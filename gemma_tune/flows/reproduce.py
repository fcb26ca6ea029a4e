"""A run made again from its lock, and compared bit by bit."""

from dataclasses import asdict, dataclass, replace

from gemma_tune.errors import RunError
from gemma_tune.flows.decide import decide, lock_of
from gemma_tune.flows.train import train_run
from gemma_tune.identity import file_sha256
from gemma_tune.machine.quiet import libraries_to
from gemma_tune.machine.world import ALONE
from gemma_tune.recipe.load import load_recipe
from gemma_tune.runs.adapter_dir import AdapterDir, open_run_adapter
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.lock import read_lock
from gemma_tune.runs.manifest import read_manifest
from gemma_tune.runs.reporter import Reporter
from gemma_tune.runs.resume import lock_differences


@dataclass(frozen=True)
class Reproduction:
    """A run made again."""

    differences: list[str]  # what is not as it was, a sentence each; with any of them equal bits are not promised
    run: RunDir | None  # the new run; None when it was only looked for differences
    adapters: tuple[str, str] | None  # SHA-256 of the weights, then and now

    @property
    def is_equal(self) -> bool:
        return self.adapters is not None and self.adapters[0] == self.adapters[1]


def reproduce_run(run: RunDir, *, reporter: Reporter, check_only: bool) -> Reproduction:
    """Compare a run's lock with this machine, then make the run again next to it and compare the adapters.

    Raises:
        RunError: the run has no adapter yet, or its base or rows are not those of then.
    """
    open_run_adapter(run).require_sound()
    before = read_lock(run)
    fresh = ("run.name=", "run.resume=never", "export.formats=[]", f"run.output_dir={run.path.parent}")
    loaded = replace(load_recipe(run.resolved_recipe, fresh), name=f"{run.name}-again", overrides=())
    with libraries_to(None):
        lock = asdict(lock_of(decide(loaded), data=before["data"], world=ALONE))
    differences = lock_differences(before, lock)
    changes = [change for each in read_manifest(run).resumes for change in each["changed"]]
    told = [
        *differences.refused,
        *differences.allowed,
        *(f"it was resumed with another {change}" for change in changes),
    ]
    if check_only:
        return Reproduction(told, None, None)
    for line in told:
        reporter.warn(line)
    if differences.refused:
        raise RunError(
            f"{run.path} cannot be made again:\n" + "\n".join(f"  {line}" for line in differences.refused),
            hint="restore what it was trained on",
        )
    again = train_run(loaded, reporter=reporter)
    rows = lock_differences(before, read_lock(again)).refused
    hashes = [file_sha256(AdapterDir(each.adapter).weights_file) for each in (run, again)]
    return Reproduction([*told, *rows], again, (hashes[0], hashes[1]))
