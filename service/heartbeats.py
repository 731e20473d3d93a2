"""The workers that share a database: which of them are alive, and who takes over from the others.

Each writes the time into a row of its own, by the database's clock. A row that has become old is
claimed by one of the others, by a change that only one of them can make; who has claimed it gives
the work that was begun there to all. A claim becomes old too.
"""

import logging
import math
import threading
import time
from collections.abc import Callable

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

__all__ = ["Heartbeats"]

log = logging.getLogger(__name__)
BEATING, OLD = 5.0, 30.0
"""Seconds between beats, and those after which a worker is taken for dead."""
WORKERS = sa.Table(
    "miss_iwem_workers",
    sa.MetaData(),
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("seen", sa.Float, nullable=False),
)
CREATING = 0x6D697765
"""The lock of who makes the table."""
NOW = sa.extract("epoch", sa.func.clock_timestamp())


class Heartbeats:
    """Those of one worker, who watches all the others'."""

    def __init__(
        self,
        database: str,
        name: str,
        *,
        alive: Callable[[], bool],
        take_over: Callable[[str], None],
    ) -> None:
        url = sa.make_url(database).set(drivername="postgresql+psycopg")
        self._engine = sa.create_engine(url, pool_size=1, pool_pre_ping=True)
        self._name, self._alive, self._take_over = name, alive, take_over
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)

    def prepare(self) -> None:
        """Makes the table, if there is none yet; another worker may be making it too."""
        with self._engine.begin() as connection:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(CREATING)))
            WORKERS.create(connection, checkfirst=True)

    def start(self) -> None:
        """Begins to beat."""
        self._thread.start()

    def stop(self) -> None:
        """Beats no more, and says so: the others need not wait."""
        self._stopping.set()
        self._thread.join()
        mine = WORKERS.c.name == self._name
        try:
            with self._engine.begin() as connection:
                connection.execute(sa.update(WORKERS).where(mine).values(seen=0.0))
        except SQLAlchemyError:
            log.warning("The database cannot be reached; others will find out.", exc_info=True)
        self._engine.dispose()

    def _run(self) -> None:
        failed = -math.inf
        while True:
            try:
                self._beat()
                if time.monotonic() > failed + OLD:  # or others could not beat either
                    for name in self._old():
                        self._bury(name)
            except Exception as error:
                failed = time.monotonic()
                log.warning("A heartbeat failed, and is tried again: %s", error)
            if self._stopping.wait(BEATING):
                return

    def _beat(self) -> None:
        """A worker that does nothing any more does not beat: its work is done elsewhere."""
        if not self._alive():
            return
        mine = WORKERS.c.name == self._name
        with self._engine.begin() as connection:
            if not connection.execute(sa.update(WORKERS).where(mine).values(seen=NOW)).rowcount:
                connection.execute(sa.insert(WORKERS).values(name=self._name, seen=NOW))

    def _old(self) -> list[str]:
        """The workers that are taken for dead."""
        old = sa.and_(WORKERS.c.seen < NOW - OLD, WORKERS.c.name != self._name)
        with self._engine.begin() as connection:
            return list(connection.execute(sa.select(WORKERS.c.name).where(old)).scalars())

    def _bury(self, name: str) -> None:
        """Takes over from a worker, unless another does."""
        theirs = WORKERS.c.name == name
        claim = sa.update(WORKERS).where(theirs, WORKERS.c.seen < NOW - OLD).values(seen=NOW)
        with self._engine.begin() as connection:
            claimed = connection.execute(claim).rowcount
        if claimed:
            log.warning("Worker %s is gone; what it had begun is begun again.", name)
            self._take_over(name)
            with self._engine.begin() as connection:
                connection.execute(sa.delete(WORKERS).where(theirs))
