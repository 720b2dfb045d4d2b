"""The command line: one function for each verb, thin over the Python interface.

Exit codes: 0 done; 2 the arguments or inputs cannot be used; 1 it failed while running; 75 a training was
asked to stop, saved, and can be resumed.
Nothing heavy is imported before a verb needs it, so that `mocohub --help` is instant.
"""

import logging
import os
import sys
import warnings
from collections.abc import Sequence

import tyro

from mocohub.cli import evaluating, features, linear, models, probing, publishing, searching, training
from mocohub.errors import unknown

VERBS = {
    "demo": training.demo,
    "pretrain": training.pretrain,
    "export": models.export,
    "extract": features.extract,
    "features": features.features_,
    "search": searching.search,
    "report": searching.report,
    "evaluate": evaluating.evaluate,
    "retrieval": evaluating.retrieval,
    "health": evaluating.health,
    "knn": probing.knn,
    "linear": linear.linear,
    "lowshot": probing.lowshot,
    "svm": probing.svm,
    "plot": training.plot,
    "inspect": models.inspect,
    "info": models.info,
    "list": models.list_,
    "convert": publishing.convert,
    "publish": publishing.publish,
    "verify": publishing.verify,
    "card": publishing.card,
    "zoo": publishing.zoo,
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code (wrong usage exits with 2 from within)."""
    args = sys.argv[1:] if args is None else list(args)
    logging.basicConfig(format="mocohub: %(message)s")
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"mocohub: {message}\n"  # no file, no line of code
    try:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            raise unknown("verb", args[0], VERBS)
        tyro.extras.subcommand_cli_from_dict(
            VERBS,
            prog="mocohub",
            description="Momentum Contrast: pre-train, export, load, extract and probe.",
            args=args,
            config=(
                tyro.conf.DisallowNone,
                tyro.conf.FlagCreatePairsOff,
                tyro.conf.PositionalMetavarFromFieldName,
            ),
        )
        sys.stdout.flush()
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, ImportError) as error:
        print(f"mocohub: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # of `mocohub list | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit would complain too
        return 1
    except (RuntimeError, OSError) as error:
        print(f"mocohub: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mocohub: interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        if type(error).__name__ != "Stopped":  # of pretrain/loop.py, which is not imported for its sake
            raise
        print(f"mocohub: {error}", file=sys.stderr)
        return 75
    finally:
        warnings.formatwarning = usual
    return 0
