"""The folder of a run: its config, and its creation, which leaves no partial run if it fails."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from openmythos.config import ConfigError
from openmythos.data.tokenizer import TOKENIZER_FILE
from openmythos.files import load_toml, remove
from openmythos.train.config import RunConfig
from openmythos.train.state import LOCK_FILE, lock

CONFIG_FILE = "config.toml"
# Where a run is written until it is complete, and what an interrupted creation may leave.
_UNFINISHED = ".unfinished"
_PARTS = ("tokens", TOKENIZER_FILE, _UNFINISHED)


def read_config(folder: Path) -> RunConfig:
    """The config of a run folder."""
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"{folder}: is not the folder of a run: it has no {CONFIG_FILE}")
    return load_toml(RunConfig, folder / CONFIG_FILE)


def require_free(folder: Path) -> None:
    """Raise unless the folder is missing, empty, or left by an interrupted `create`."""
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    interrupted = _UNFINISHED in names and names <= {LOCK_FILE, *_PARTS}
    if not folder.is_dir() or (names - {LOCK_FILE} and not interrupted):
        other = f", or --resume {folder}" if CONFIG_FILE in names else ""
        raise ConfigError(f"{folder}: exists already; choose another --out{other}")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary subfolder to write to; on success its content moves into the folder.

    The folder itself is never replaced: it may be a mount point, a link or ".".
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / _UNFINISHED
    with ExitStack() as stack:
        stack.callback(lock(folder).release)
        require_free(folder)
        try:
            _remove_parts(folder)
            unfinished.mkdir()
            yield unfinished
            # config.toml comes last: it makes the folder a run.
            for path in sorted(unfinished.iterdir(), key=lambda path: path.name == CONFIG_FILE):
                path.rename(folder / path.name)
            unfinished.rmdir()
        except BaseException:
            (folder / CONFIG_FILE).unlink(missing_ok=True)
            _remove_parts(folder)
            (folder / LOCK_FILE).unlink(missing_ok=True)
            if made:
                with suppress(OSError):
                    folder.rmdir()
            raise


def _remove_parts(folder: Path) -> None:
    """Remove an incomplete run; last its marker, so that an interrupted removal is recognised."""
    for name in _PARTS:
        remove(folder / name)
