"""What happens to the input before the loops."""

from torch import nn

from openmythos.recurrence.injection import Drive, InjectionLayer
from openmythos.types import Hidden


class Entry(nn.Module):
    """Prelude norm and `injection.prepare` as one module, to be compiled together."""

    def __init__(self, norm: nn.Module, injection: InjectionLayer) -> None:
        super().__init__()
        self._parts = (norm, injection)  # a tuple: their parameters stay the block's own

    def forward(self, encoded: Hidden) -> tuple[Hidden, Drive]:
        norm, injection = self._parts
        encoded = norm(encoded)
        return encoded, injection.prepare(encoded)
