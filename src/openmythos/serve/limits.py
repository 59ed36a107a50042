"""What the server accepts; `--set limits.NAME=VALUE` of the command."""

from dataclasses import dataclass, fields

from openmythos.config import require_int, require_number
from openmythos.recurrence.loop_sampling import MOST_LOOPS


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """Sizes, counts and times in seconds.

    `max_requests` and `max_prompt_token_loops` (tokens of prompts times their loops) are what a
    replica holds, waiting and running; more is answered with 429. A replica that has work and is
    silent for `hang_seconds` makes /health answer 503. A client that takes nothing of its answer
    for `write_seconds` is given up. /v1/loops answers at most `max_loop_rows` rows (positions times
    loops), and computes at most `max_loop_values` logits and numbers of states at a time.
    """

    max_requests: int = 64
    max_prompt_token_loops: int = 2**21
    max_new_tokens: int = 4096
    max_loops: int = 64
    max_loop_rows: int = 2**14
    max_loop_values: int = 2**27
    max_body_bytes: int = 2**20
    body_seconds: float = 30.0
    request_seconds: float = 600.0
    write_seconds: float = 30.0
    shutdown_seconds: float = 30.0
    hang_seconds: float = 10.0
    keep_alive_seconds: float = 15.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name.startswith("max_"):
                require_int(field.name, getattr(self, field.name), minimum=1)
        require_int("max_loops", self.max_loops, minimum=1, maximum=MOST_LOOPS)
        for name in ("body", "request", "write", "shutdown", "hang", "keep_alive"):
            require_number(f"{name}_seconds", getattr(self, f"{name}_seconds"), above=0)
