#!/usr/bin/env python3
"""Takes whole fp32 weights out of the checkpoints in a folder. Each save leaves a copy of this file beside its tag.

    python zero_to_fp32.py . OUT                        # OUT/pytorch_model.bin, for torch.load
    python zero_to_fp32.py . OUT --safe_serialization   # OUT/model.safetensors
    python zero_to_fp32.py --help

It runs with the Python that deepspeedlite is installed in, on one machine, without a GPU.
"""

from __future__ import annotations

import argparse
import sys


def main() -> None:
    """Run the command line; ends with a sentence and status 1 where the weights cannot be had."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint_dir", help="the folder with `latest`, or one tag's")
    parser.add_argument("output_dir", help="a new folder")
    parser.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="bytes of a file (5GB)")
    parser.add_argument("--safe_serialization", action="store_true", help="write safetensors, not files for torch.load")
    parser.add_argument("-t", "--tag", help="the one that `latest` names, if not given")
    parser.add_argument("--exclude_frozen_parameters", action="store_true", help="leave out what was not trained")
    args = parser.parse_args()
    try:
        from deepspeedlite.errors import CheckpointError
        from deepspeedlite.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
    except ImportError as error:
        sys.exit(
            f"zero_to_fp32.py reads checkpoints with deepspeedlite, which {sys.executable} cannot import ({error}); "
            "run it with the Python of the training, or install deepspeedlite there"
        )
    try:
        convert_zero_checkpoint_to_fp32_state_dict(**vars(args))
    except (CheckpointError, OSError) as error:
        sys.exit(str(error))
    print(f"the weights are in {args.output_dir}")


if __name__ == "__main__":
    main()
