"""The command `secateur`: one file per group of commands, each importing torch only when it runs."""

import sys
from collections.abc import Sequence

import typer

from models.errors import CheckpointError, SecateurError
from service.cli import demo, keys, storage
from service.cli.calibrate import calibrate_cascade
from service.cli.checkpoints import classify, inspect
from service.cli.compare import compare
from service.cli.evaluate import evaluate
from service.cli.experiments import promote, report
from service.cli.importing import import_vmoe
from service.cli.measure import measure
from service.cli.output import note
from service.cli.plan import plan
from service.cli.prune import PruneCommand, prune
from service.cli.samplesize import samplesize
from service.cli.serve import check_config, serve
from service.cli.train import finetune, pretrain, recover

USER_ERROR = 2
FAILURE = 1

app = typer.Typer(
    name="secateur",
    help="Prune fine-tuned Mixture-of-Experts classifiers, prove that nothing was lost, serve what survives.",
    epilog="Exit codes: 0 done, 1 a checkpoint is broken or failed its verification, 2 the request makes no sense, "
    "3 a plan or a calibration found nothing that passes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve")(serve)
app.command("classify")(classify)
app.command("inspect")(inspect)
app.command("measure")(measure)
app.command("evaluate")(evaluate)
app.command("compare")(compare)
app.command("prune", cls=PruneCommand)(prune)
app.command("plan")(plan)
app.command("samplesize")(samplesize)
app.command("calibrate-cascade")(calibrate_cascade)
app.command("pretrain")(pretrain)
app.command("finetune")(finetune)
app.command("recover")(recover)
app.command("import-vmoe")(import_vmoe)
app.command("report")(report)
app.command("promote")(promote)
app.add_typer(demo.app, name="demo")
app.add_typer(storage.app, name="storage")
app.add_typer(keys.app, name="keys")
app.command("check-config")(check_config)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave by SystemExit. arguments: those after the program's name, default: sys.argv's."""
    try:
        app(args=arguments, prog_name="secateur")
    except SecateurError as error:
        note(f"error: {error.message}")
        sys.exit(FAILURE if isinstance(error, CheckpointError) else USER_ERROR)
    except OSError as error:
        note(f"error: {error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
        sys.exit(FAILURE)
