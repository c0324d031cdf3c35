"""A program that `test_canaries.py` starts: `shoestring` commands one after the other, with ranks that leak whatever they can.

    python driver.py CANARIES.json JOBS.json CODES.json [words that nobody reads]

JOBS: lists of words of `shoestring`. CODES: what each ended with. In a run called "leaky" rank 0 fails in the second step, with secrets
in the message and in a local variable; started again, rank 1 hangs there, and is killed after its stacks are written; at the third time its
data is bad, which ends the run, and rank 0 loses its peer. On every rank everything secret is printed before that.
"""

import contextlib
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path

from shoestring.launch import cli

CANARIES = json.loads(Path(sys.argv[1]).read_text())


def leak() -> None:
    """As a library might: everything secret that is at hand, on every stream."""
    texts = [f"{name} is {os.environ[name]}" for name in CANARIES["variables"]]
    texts += [path.read_text() for path in map(Path, CANARIES["files"])]
    texts.append(f"fatal: unable to access 'https://someone:{CANARIES['a password in a URL']}@127.0.0.1/x.git'")
    for text in texts:
        print(text)
        print(text, file=sys.stderr, flush=True)
        logging.getLogger("somebody").warning(text)
        warnings.warn(text, stacklevel=1)


def break_steps() -> None:
    from shoestring.train import trainer
    from shoestring.train.alerts.channels import Webhook
    from shoestring.train.data.documents import DataError

    step = trainer._Session._step

    def broken(session):
        if session.config.name != "leaky" or session.progress.step != 1:
            return step(session)
        key = CANARIES["a local variable"]
        leak()
        restarts = session.run_dir / "restarts.jsonl"
        restart = len(restarts.read_text().splitlines()) if restarts.exists() else 0
        if restart == 1 and session.rank == 1:
            time.sleep(3600)
        if restart == 1 or (session.rank and not restart):  # waits for the other
            return step(session)
        assert key
        told = " ".join(os.environ[name] for name in CANARIES["variables"])
        url = f"https://someone:{CANARIES['a password in a URL']}@127.0.0.1/x?access_token={CANARIES['a token in a URL']}"
        if restart and not session.rank:
            raise RuntimeError(f"Connection closed by peer: {url}: {told}")
        until = time.monotonic() + 4
        while restart and time.monotonic() < until and not [*session.run_dir.glob("flight/*/rank_0.json")]:  # else it would be killed
            time.sleep(0.01)
        raise (DataError if restart else RuntimeError)(f"500 for {url}: {told}")

    trainer._Session._step = broken
    Webhook.__init__.__kwdefaults__["tries_s"] = (0.0,)


def main() -> None:
    codes = []
    for words in json.loads(Path(sys.argv[2]).read_text()):
        if words[0] == "train":
            with contextlib.suppress(ImportError):
                break_steps()
        try:
            codes.append(cli.main(words))
        except SystemExit as error:
            codes.append(error.code)
        Path(sys.argv[3]).write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
