"""SIGTERM as notice that the machine is about to be taken away: finish the step, or give it up where it may last longer than
there is time; save, and say so with an exit code."""

import signal

from pixel_jax.parallel.processes import everywhere

CODE = 42  # exit code of a run that was preempted and saved itself: started again, it goes on


class Preempted(SystemExit):
    """Ends the program with `CODE`; what it has done is saved. A step raises it to give itself up (`loop.run`)."""

    def __init__(self):
        super().__init__(CODE)


class Notice:
    """Whether this process, or another one of the same run, has been told to go. Listens from `listen` on."""

    def __init__(self):
        self.given = False

    def listen(self) -> None:
        """From now on SIGTERM is taken for a notice."""
        signal.signal(signal.SIGTERM, self._take)

    def _take(self, number, frame) -> None:
        self.given = True

    def reached(self) -> bool:
        """Whether the run is to stop here. All processes ask at the same places, after every step at least, and are told the
        same."""
        return bool(everywhere(self.given).any())

    def obey(self) -> None:
        """`Preempted` if the run is to stop here: asked in a step, as long as it can be given up."""
        if self.reached():
            raise Preempted


NOTICE = Notice()
