"""The command `serve`."""

# `run` imports what it needs: torch takes seconds, and flags are parsed without it.

from dataclasses import dataclass
from typing import Annotated

import tyro

from openmythos.cli.flags import Changes, Device, Step, flat, shown
from openmythos.cli.screen import OUT
from openmythos.config import ConfigError, apply_overrides, needs


@dataclass(frozen=True)
class Serve:
    """Serve a model: OpenAI's API, and a page where the number of loops is a slider."""

    folder: tyro.conf.Positional[
        Annotated[
            str,
            shown(
                "MODEL",
                "the model that the package ships",
                "Run folder, model folder, GGUF file or Hub id.",
            ),
        ]
    ] = ""
    host: Annotated[str, shown("ADDRESS")] = "127.0.0.1"
    """Where to listen; 0.0.0.0 is every interface: give an API key then."""
    port: int = 8000
    """Port to listen on; 0 picks a free one."""
    replicas: Annotated[int, shown("N", "one for each core")] = 0
    """Worker processes, each with a copy of the model and one thread."""
    api_key_file: Annotated[str, shown("FILE", "")] = ""
    """File with accepted API keys, one per line; else the variable OPENMYTHOS_API_KEY."""
    name: Annotated[str, shown("NAME", "the folder's")] = ""
    """Name of the model in the API."""
    chat_template: Annotated[str, shown("FILE", "")] = ""
    """Jinja template for chat, instead of the model's own."""
    step: Step = None
    precision: Annotated[str, shown("KIND")] = "auto"
    """Precision of the weights: fp32, bf16, or auto (bf16 if the device computes it natively)."""
    set: Changes = ()
    """More settings, such as limits.max_loops=128 or engine.max_rows=16: docs/serving.md."""
    device: Device = "auto"

    def run(self) -> None:
        try:
            from openmythos.serve.run import ServerOptions, Settings, serve
        except ImportError as error:
            raise ConfigError(f"serve {needs('serve')}") from error

        options = ServerOptions(
            source=self.folder,
            host=self.host,
            port=self.port,
            replicas=self.replicas,
            name=self.name,
            api_key_file=self.api_key_file,
            chat_template=self.chat_template,
            device=self.device,
            precision=self.precision,
            step=self.step,
            settings=apply_overrides(Settings(), flat(self.set)),
        )
        serve(options, lambda line: OUT.print(line, soft_wrap=True))
