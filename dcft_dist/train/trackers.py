"""Sends a run's curves to the trackers in `trackers`: TensorBoard, Weights & Biases, MLflow.

A run that goes on after an interruption goes on in the tracker too: `trackers.json` in its folder has its ids there. What is
only shown does not stop a run: a tracker that fails is left out from then on, which is said once.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from queue import SimpleQueue
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from ..config.schema import Config
from ..config.toml import resolved_keys
from ..errors import ConfigError, line_of
from ..files import read_json_or, write_json
from ..runs.folder import RunFolder

log = logging.getLogger(__name__)

CLOSE_S = 60.0  # seconds that the end of a run waits for trackers

PROJECT = "dcft_dist"  # project of Weights & Biases, and experiment of MLflow, unless the environment names another


class Tracker(Protocol):
    """Shows curves of one run.

    Attributes:
        id: by which a later start finds the run again; None if it needs none.
    """

    @property
    def id(self) -> str | None: ...

    def log(self, step: int, values: dict[str, float]) -> None:
        """Adds values of a step. Those of a step that is made again may come again."""

    def close(self, ended: str) -> None:
        """Ends what this start has to show. `ended` is `done`, `stopped` or `failed`."""


class _TensorBoard:
    id = None

    def __init__(self, folder: RunFolder, config: Config, id: str | None, first_new: int) -> None:
        self._writer = SummaryWriter(str(folder.tensorboard), purge_step=first_new)

    def log(self, step: int, values: dict[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def close(self, ended: str) -> None:
        self._writer.close()


class _WandB:
    """Offline unless WANDB_MODE says otherwise; `wandb sync` sends the files later."""

    def __init__(self, folder: RunFolder, config: Config, id: str | None, first_new: int) -> None:
        import wandb

        self.id = id or secrets.token_hex(4)
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=config.name,
            id=self.id,
            resume="allow",
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            dir=folder.path,
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, disable_code=True, init_timeout=60, login_timeout=30
            ),
        )
        self._run.define_metric("*", step_metric="step")  # its own count of steps cannot go back to a checkpoint

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, ended: str) -> None:
        self._run.finish(exit_code=int(ended == "failed"))


class _MLflow:
    """In the folder `mlruns` of all runs, unless MLFLOW_TRACKING_URI names another place."""

    def __init__(self, folder: RunFolder, config: Config, id: str | None, first_new: int) -> None:
        import mlflow

        logging.getLogger("urllib3").setLevel(logging.ERROR)  # it tells each attempt to reach a server
        place = os.environ.get("MLFLOW_TRACKING_URI", (folder.path.resolve().parent / "mlruns").as_uri())
        self._client: Any = mlflow.MlflowClient(tracking_uri=place)
        if id is not None:
            with suppress(mlflow.MlflowException):  # not in this place
                self._client.update_run(id, status="RUNNING")
                self.id = id
                return
        self.id = str(self._client.create_run(self._experiment(), run_name=config.name).info.run_id)
        entity = mlflow.entities
        parameters = [entity.Param(key, value[:5000]) for key, value in resolved_keys(config).items()]  # MLflow's longest
        for i in range(0, len(parameters), 100):  # as many as it takes at once
            self._client.log_batch(self.id, params=parameters[i : i + 100])

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        for _ in range(2):
            if found := self._client.get_experiment_by_name(name):
                return str(found.experiment_id)
            try:
                return str(self._client.create_experiment(name))
            except Exception:  # another run may have made it just now
                time.sleep(0.5)
        return str(self._client.get_experiment_by_name(name).experiment_id)

    def log(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        named = {re.sub(r"[^\w\-. :/]", "_", key): value for key, value in values.items()}  # names of classes are in them
        self._client.log_batch(self.id, metrics=[Metric(key, value, now, step) for key, value in named.items()])

    def close(self, ended: str) -> None:
        self._client.set_terminated(self.id, {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[ended])


_MAKE: dict[str, Callable[[RunFolder, Config, str | None, int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}


# Nothing is sent anywhere that the user has not named; and MLflow keeps runs in files only with a word: its databases do not
# stand several writers on a shared file system.
_AT_HOME = {"WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}


@contextmanager
def _at_home() -> Iterator[None]:
    """Inside, libraries that are imported and clients that are made keep to themselves, unless the environment says else."""
    given = {name for name in _AT_HOME if name in os.environ}
    for name, value in _AT_HOME.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name in _AT_HOME.keys() - given:
            os.environ.pop(name, None)


def require_trackers(names: Sequence[str]) -> None:
    """Checks that the packages of trackers are installed.

    Args:
        names: as in the key `trackers`.

    Raises:
        ConfigError: one is not.
    """
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"trackers: {name} is not installed: pip install 'dcft_dist[trackers]'")


class Trackers:
    """The trackers of one run. Only rank 0 has any; the others may make the same calls.

    A thread talks to the trackers, so that one that does not answer holds nothing up.
    """

    def __init__(self, folder: RunFolder, config: Config, active: bool) -> None:
        """
        Args:
            folder: of the run.
            config: of the run; its `trackers` are the names.
            active: whether this is rank 0.
        """
        self._folder, self._config = folder, config
        self._names = list(config.trackers) if active else []
        self._trackers: dict[str, Tracker] = {}
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def begin(self, first_new: int) -> None:
        """Opens the trackers.

        Args:
            first_new: values of this step, and of later ones, which an earlier start has logged, do not count.
        """
        if not self._names or self._thread is not None:
            return
        self._thread = threading.Thread(target=self._talk, name="dcft_dist: trackers", daemon=True)
        self._thread.start()
        for name in self._names:
            self._work.put(partial(self._open, name, first_new))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Adds the values of a step to every tracker."""
        for name in self._names:
            self._work.put(partial(self._with, name, lambda tracker: tracker.log(step, values)))

    def close(self, ended: str) -> None:
        """Closes the trackers, and gives up those that take longer than `CLOSE_S`; later calls do nothing.

        Args:
            ended: `done`, `stopped` or `failed`.
        """
        if self._thread is None:
            return
        for name in self._names:
            self._work.put(partial(self._with, name, lambda tracker: tracker.close(ended)))
        self._work.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            waited = f"{CLOSE_S:g} s"
            log.warning("the trackers %s do not answer: given up after %s", " and ".join(self._names), waited)
        self._thread, self._names = None, []

    def _talk(self) -> None:
        while (call := self._work.get()) is not None:
            call()

    def _open(self, name: str, first_new: int) -> None:
        kept = read_json_or(self._folder.trackers, {})
        ids = kept.get("ids") if isinstance(kept, dict) and kept.get("run") == self._config.name else {}
        pairs = ids.items() if isinstance(ids, dict) else ()
        ids = {key: id for key, id in pairs if key in _MAKE and isinstance(id, str) and re.fullmatch(r"\w{1,64}", id)}
        with self._left_out_if_it_fails(name), _at_home():
            tracker = self._trackers[name] = _MAKE[name](self._folder, self._config, ids.get(name), first_new)
            if tracker.id is not None and tracker.id != ids.get(name):
                write_json(self._folder.trackers, {"run": self._config.name, "ids": {**ids, name: tracker.id}})

    def _with(self, name: str, call: Callable[[Tracker], None]) -> None:
        if name in self._trackers:
            with self._left_out_if_it_fails(name):
                call(self._trackers[name])

    @contextmanager
    def _left_out_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # wandb raises KeyboardInterrupt where nobody answers its questions
            self._trackers.pop(name, None)
            cause = f"{type(error).__name__}: {line_of(error)}" if isinstance(error, Exception) else type(error).__name__
            log.warning("the tracker %s has failed, and the run goes on without it: %s", name, cause)
