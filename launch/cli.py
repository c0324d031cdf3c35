"""The command line: `shoestring COMMAND ...`. `launch/commands/` has the commands, each a few lines and an entry in a table.

Nothing heavy is imported here: `shoestring --help` and `--cfg job` answer in half a second, where torch alone takes two. What a command
runs is therefore named by a string and resolved when it is needed, in `command.call` only; a test resolves every one of them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from . import exit_codes, secrets
from .commands import claims, models, runs

_TABLES = {**runs.COMMANDS, **claims.COMMANDS, **models.COMMANDS}
_ORDER = (
    "train launch dash runs dollars report grafana workspace "
    "doctor plan rehearse verify bench data checkpoint sample export import upcycle"
)
COMMANDS = {name: _TABLES[name] for name in _ORDER.split()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. Errors that a person can mend are one line on stderr, others a traceback."""
    _leave_the_tree()
    secrets.install()
    parser, parsers = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.command is None:
        parser.print_help()
        return exit_codes.CONFIG
    # Overrides may stand before and after options; argparse takes only the first run of them.
    if rest and (any(word.startswith("-") for word in rest) or not hasattr(args, "overrides")):
        parsers[args.command].error(f"what is {' '.join(rest)}?")
    if rest:
        args.overrides = [*args.overrides, *rest]
    try:
        secrets.refuse(sys.argv[1:] if argv is None else argv, getattr(args, "config_dir", None))
        return COMMANDS[args.command].run(args) or exit_codes.OK
    except (Exception, KeyboardInterrupt) as error:
        code = exit_codes.of(error)
        if code == exit_codes.FAILED:
            raise
        print(f"error: {exit_codes.sentence(error)}", file=sys.stderr)
        return code


def _leave_the_tree() -> None:
    """`python -m shoestring...` in the repository puts it on the path, where `train` and `kernels` would be found as top-level packages
    (transformers looks for a `kernels`)."""
    tree = Path(__file__).resolve().parents[1]
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != tree]


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    codes = "\n".join(f"  {code:>3}  {meaning}" for code, meaning in exit_codes.MEANING.items())
    parser = argparse.ArgumentParser(
        prog="shoestring",
        description="Trains DeepSeek-V3-class mixture-of-experts language models on a small budget.",
        epilog=f"exit codes:\n{codes}\n\n`shoestring COMMAND --help` has each command's arguments and examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"shoestring {__version__}")
    choices = parser.add_subparsers(dest="command", metavar="COMMAND")
    parsers = {}
    for name, command in COMMANDS.items():
        parsers[name] = choices.add_parser(
            name,
            help=command.help,
            description=command.help[0].upper() + command.help[1:] + ".",
            epilog="examples:\n" + "\n".join(f"  {line}" for line in command.examples) if command.examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.arguments(parsers[name])
    return parser, parsers
