"""How far a process has got with the lake, for people to see."""

from __future__ import annotations

from headrace.contract.interfaces.progress import Progress
from headrace.trainer.source.source import Source


class LakeProgress:
    """Tells how many of the stored rows are learnt, from those that there were when this process began with them."""

    def __init__(self, progress: Progress, source: Source) -> None:
        self._progress, self._source = progress, source
        self._rows = 0
        """How many there were; 0 while none is learnt."""

    def show(self) -> None:
        """Tell how far it is; once more when the lake is learnt."""
        if self._source.is_stored:
            left = self._source.stored_left
            if not self._rows:
                self._rows = left
                self._progress.begin("learning the lake", left)
            self._progress.done(self._rows - left)
        elif self._rows:
            self._progress.done(self._rows)
            self._progress.end()
            self._rows = 0
