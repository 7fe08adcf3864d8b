"""The agents' line: each tells the others, through node 0's store, that it lives, what it was asked, and when its ranks
have failed. Ranks notice a lost peer in their next collective only, minutes later maybe, and NCCL's not even then.
"""

import atexit
import json
import threading
import time
from typing import Any

BEAT_S = 0.5
_CLOSE_S = 2.0
SILENT_S = 8.0  # an agent that gives no sign for so long is gone, or its network is


class Line:
    """Kept up by a thread for as long as this process lives; on one node there is nobody to tell.

    asked: the stop signal that this node was asked by, told to the others. heard: the one that another was. lost: why
    the run of the present job cannot go on, as far as other nodes are concerned.
    """

    def __init__(self, store: Any, rank: int, count: int) -> None:
        self.asked: str | None = None
        self.heard: str | None = None
        self.lost: str | None = None
        self.joined: set[int] = {rank}
        self._rank, self._others = rank, [other for other in range(count) if other != rank]
        self._job, self._failed = 0, False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, args=(store,), name="line", daemon=True)
        if self._others:
            self._thread.start()
            # The interpreter's teardown unwinds daemon threads, and aborts where one is inside torch's store.
            atexit.register(self.close)

    def close(self) -> None:
        """Give no sign any more."""
        self._over.set()
        self._thread.join(_CLOSE_S)

    def begin(self, job: int) -> None:
        """Another job: what became of the last one is past."""
        self._job, self._failed, self.heard, self.asked = job, False, None, None
        if self.lost is not None and "failed" in self.lost:
            self.lost = None

    def fail(self) -> None:
        """This node's ranks have failed."""
        self._failed = True
        if self._others:
            time.sleep(2 * BEAT_S)  # this agent may be about to leave, and then tells nothing any more

    def wait_for_loss(self) -> str | None:
        """What is lost, once that is certain; None where nothing is."""
        end = time.monotonic() + SILENT_S + 2 * BEAT_S
        while self._others and self.lost is None and time.monotonic() < end:
            time.sleep(BEAT_S / 5)
        return self.lost

    def _keep(self, store: Any) -> None:
        seen: dict[int, tuple[int, float]] = {}  # of each other node: its last beat, and when that was new
        beat = 0
        try:
            from torch.distributed import PrefixStore

            mine = PrefixStore("wan_dist/line", store.clone())  # who waits in a store blocks its connection
            while not self._over.wait(BEAT_S):
                beat += 1
                told = {"beat": beat, "job": self._job, "asked": self.asked, "failed": self._failed}
                mine.set(str(self._rank), json.dumps(told))
                for other in self._others:
                    if other in seen or mine.check([str(other)]):
                        self._hear(other, json.loads(mine.get(str(other))), seen)
        except RuntimeError:  # the store has gone, with the agent that served it
            self.lost = self.lost or "node 0 is gone"

    def _hear(self, other: int, told: dict[str, Any], seen: dict[int, tuple[int, float]]) -> None:
        self.joined.add(other)
        before, since = seen.get(other, (-1, 0.0))
        now = time.monotonic()
        if told["beat"] != before:
            seen[other] = (told["beat"], now)
        elif now - since > SILENT_S and self.lost is None:
            self.lost = f"node {other} is gone: its wan-dist has given no sign for {SILENT_S:.0f} s"
        if told["job"] == self._job:
            self.heard = self.heard or told["asked"]
            if told["failed"] and self.lost is None:
                self.lost = f"node {other} has failed; its own output says why"
