"""Compare finished runs: which settings differ, and whether their scores differ by more than chance.

python compare.py outputs/BASELINE outputs/OTHER
python compare.py 'outputs/minilm-*-lr2e-05-*' 'outputs/minilm-*-lr5e-05-*' --output_dir comparisons/rates

Runs with equal settings but for the seed form one group; the group of the first run is the baseline.
"""

from pathlib import Path

from lib.config.cli import parse_cli
from lib.config.compare import CompareConfig
from lib.errors import printable
from lib.runtime.streams import keep_writing

if __name__ == "__main__":  # before the heavy imports: --help and a misspelt flag answer at once
    keep_writing(only_prints=True)
    CONFIG = parse_cli(CompareConfig)

from lib.runtime.startup import run_script  # imports the heavy libraries, without what is not used

# isort: split
from lib.experiments.comparison import compare_groups
from lib.experiments.comparison_report import check_comparison_folder, format_comparison, write_comparison
from lib.experiments.groups import load_groups
from lib.runtime.atomic import AGAIN, explaining


def main(config: CompareConfig) -> None:
    """Print the comparison; with --output_dir write it as text, numbers and a picture, too."""
    if config.output_dir:
        check_comparison_folder(Path(config.output_dir))
    groups = load_groups(config.runs, config.split)
    metrics = compare_groups(groups, config)
    text = format_comparison(groups, metrics, config)
    if config.output_dir:
        with explaining(Path(config.output_dir), AGAIN):
            write_comparison(Path(config.output_dir), text, groups, metrics)
    print(text)
    if config.output_dir:
        print(f"\nwritten to {printable(config.output_dir)}: comparison.md, comparison.json, comparison.png")


if __name__ == "__main__":
    run_script(main, CONFIG)
