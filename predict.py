"""Predict labels with a trained model, or several together: one file per image, on the very grid of the original."""

import argparse
import sys
from pathlib import Path

from lib.prediction import predict
from lib.runtimes import RUNTIMES
from lib.system.cli import Parser, number, one_of, run_script
from lib.system.files import made


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="predict.py", description="Predict labels with a trained model, one file per image.")
    add = parser.add_argument
    data_help = (
        "the data set whose preprocessing is used: its name, its folder, or a run (default: that of the training)"
    )
    add("--data", metavar="NAME|FOLDER", help=data_help)
    add("--output", required=True, type=Path, help="folder of the predictions (required)")
    add(
        "--model_state",
        required=True,
        type=Path,
        nargs="+",
        metavar="MODEL",
        help="a saved model, RUN/models/model-E, or an exported one, OUT.onnx; or several, such as those of all folds, "
        "which are averaged (required)",
    )
    add("--original", type=Path, help="folder of the data set (default: the data set's own folder)")
    add("--in_filters", type=Path, help="filter file to check the model against (default: none)")
    add("--out_filters", type=Path, help="filter file to check the model against (default: none)")
    add(
        "--input",
        type=Path,
        help="an image, a folder of images or of DICOM series, or one laid out as the data set or one of its subjects, "
        "to predict all of it instead of a partition; images of own data are named CASE_0000, CASE_0001, ... by "
        "channel; --original and --partition then have no meaning (default: none; an exported model needs it)",
    )
    add("--partition", **one_of(("train", "validation", "test")), default="test", help="which subjects (default: test)")
    add("--no_tta", action="store_true", help="do not average over mirrorings (default: average over all)")
    step_help = "from one window to the next, as a share of the patch; larger is faster and less exact (default: 0.5)"
    add("--step_size", type=number(float, 0, 1, open_low=True), default=0.5, metavar="SHARE", help=step_help)
    add(
        "--no_postprocessing",
        action="store_true",
        help="keep all components, whatever the training has decided in RUN/postprocessing.json (default: as decided)",
    )
    runtime_help = "what computes an exported model, OUT.onnx (default: auto, the fastest that is installed)"
    add("--runtime", **one_of(("auto", *RUNTIMES)), default="auto", help=runtime_help)
    device_help = "auto, cpu, cuda, cuda:N or mps; of exported models auto, cpu or cuda (default: auto, the fastest)"
    add("--device", default="auto", help=device_help)
    batch_help = "patches computed at once (default: 8 in 2D, 2 on the CPU; 2 in 3D)"
    add("--batch_size", type=number(int, 1, 10**6), help=batch_help)
    amp_help = "compute in bfloat16 where that is safe and, on the CPU, faster (default: float32 throughout)"
    add("--amp", action="store_true", help=amp_help)
    compile_help = (
        "let torch compile the network first, which takes a minute and pays for many images (default: do not)"
    )
    add("--compile", action="store_true", help=compile_help)
    add("--probabilities", action="store_true", help="also write <id>_probabilities.nii.gz (default: labels only)")
    add(
        "--challenge_names",
        action="store_true",
        help="name predictions as the challenge wants: prediction_NNNNN.nii.gz for kits (default: <id>.nii.gz)",
    )
    add(
        "--patch_size",
        type=number(int, 1, 2**14),
        nargs="+",
        metavar="N",
        help="size of a window, 2 or 3 numbers (default: that of the training, from RUN/config.json; without this "
        "file the data set's)",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--skip_existing", action="store_true", help="finish an interrupted prediction (default: refuse)"
    )
    existing.add_argument("--overwrite", action="store_true", help="replace existing predictions (default: refuse)")
    return parser.parse_args(argv)


def run(argv: list[str] | None) -> None:
    args = parse_arguments(argv)
    with made(args.output):
        predict(args)


def main(argv: list[str] | None = None) -> int:
    """Predict as `argv` says; returns the exit code of `run_script`."""
    return run_script(lambda: run(argv), "what is written is whole; go on with --skip_existing, or do it again")


if __name__ == "__main__":
    sys.exit(main())
