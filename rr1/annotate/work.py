"""Many questions at once: threads, what stops them, and what is said meanwhile."""

import os
import signal
import sys
from concurrent.futures import Future, ThreadPoolExecutor, as_completed

import cv2
from tqdm import tqdm

from rr1.annotate.folder import Folder
from rr1.annotate.questions import Source
from rr1.annotate.rows import make_row
from rr1.annotate.teachers import ChatTeacher, Rejected
from rr1.client import NoAnswer, Stop

STOPPED = "stopped by Ctrl-C"
HOPELESS = 10  # so many rejections one after the other, and nothing good, stop the run
LOG_EVERY = 30.0  # seconds between two lines where there is no terminal


def work(config, folder: Folder, todo: list[Source], teacher) -> str:
    """Annotate `todo` on --workers threads, adding to the folder.

    Returns why it stopped early or what was left undone; "" if nothing was.
    """
    cv2.setNumThreads(1)  # there is a thread for each question
    chat = teacher if isinstance(teacher, ChatTeacher) else None
    pool = ThreadPoolExecutor(config.workers)
    futures = {}
    for source in todo:
        future = pool.submit(make_row, source, config, teacher, folder.attempts(source.id))
        futures[future] = source
    collector = Collector(config.workers, folder)
    interval = 0.1 if sys.stderr.isatty() else LOG_EVERY
    bar = tqdm(total=len(todo), unit="question", mininterval=interval)
    try:
        for future in as_completed(futures):
            collector.take(futures[future], future)
            cost = f", ${chat.spent:.2f}" if chat and any(chat.prices) else ""
            bar.set_postfix_str(f"{len(folder.rejected)} rejected{cost}", refresh=False)
            bar.update()
        return collector.problem
    except Stop as error:
        return str(error)
    except KeyboardInterrupt:
        if chat:
            print(
                "\nwaiting for the answers under way, which are paid for", file=sys.stderr
            )
            wait = f"up to {max(config.timeout, 120):.0f} seconds"
            print(f"({wait}); Ctrl-C again stops at once", file=sys.stderr, flush=True)
        return STOPPED
    finally:
        before = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        if chat:
            chat.client.stop("stopped")
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGINT, before)
        bar.close()


class Collector:
    """Puts results into the folder, and raises Stop where going on would be of no use."""

    def __init__(self, workers: int, folder: Folder):
        self.workers, self.folder, self.problem = workers, folder, ""
        self.unanswered = 0
        self.unanswered_in_a_row, self.rejected_in_a_row = 0, 0

    def take(self, source: Source, future: Future) -> None:
        try:
            self.folder.add(future.result())
            self.unanswered_in_a_row, self.rejected_in_a_row = 0, 0
        except Rejected as error:
            self.folder.reject(source, error)
            self.unanswered_in_a_row = 0
            self.rejected_in_a_row += 1
            nothing_good = error.again or not self.folder.done
            if nothing_good and self.rejected_in_a_row >= HOPELESS:
                raise Stop(
                    f"{HOPELESS} questions in a row were rejected, the last: {error}"
                )
        except NoAnswer as error:
            self.unanswered += 1
            self.unanswered_in_a_row += 1
            self.problem = (
                f"{self.unanswered} questions are left undone, no answer came ({error})"
            )
            if self.unanswered_in_a_row > self.workers:
                raise Stop(f"the server has stopped answering ({error})") from None
