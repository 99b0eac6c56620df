"""Train many runs and choose among them: several seeds, a grid of settings, or a search.

python sweep.py --seeds 5 -- --model roberta-base --dataset sst5
python sweep.py --grid lr=1e-5,2e-5 bs=16,32 --seeds 3
python sweep.py --search lr=1e-5:1e-4:log warmup_steps=0:0.2 --trials 16 --halving 3 --finalists 2 --seeds 3

Each run is a train.py command in a process of its own. Started again, finished runs are read and stopped ones resumed.
"""

from lib.config.cli import ending_on_user_error, parse_cli
from lib.config.sweep import SweepConfig, build_recipes
from lib.data.catalog import data_needs
from lib.errors import UserError, printable
from lib.hub.fetch import fetch
from lib.hub.needs import model_needs
from lib.runtime.streams import keep_writing

if __name__ == "__main__":  # before the heavy imports: --help, a misspelt flag and a missing model answer at once
    keep_writing()
    CONFIG = parse_cli(SweepConfig)
    with ending_on_user_error():
        CONFIGS = [recipe.config(0) for recipe in build_recipes(CONFIG)] if not CONFIG.list else []
        NEEDS = [need for config in CONFIGS for need in model_needs(config.model) + data_needs(config.data)]
        if NEEDS:  # all at once: afterwards every library is offline
            fetch(list(dict.fromkeys(NEEDS)), CONFIGS[0].hub)

from lib.runtime.startup import quiet_libraries, run_script  # imports the heavy libraries, without what is not used

# isort: split
from lib.experiments.out_of_fold import write_out_of_fold
from lib.experiments.sweep import Sweep
from lib.experiments.sweep_report import write_report
from lib.runtime.atomic import explaining
from lib.runtime.slots import find_slots


def main(config: SweepConfig) -> None:
    """Run what is not finished yet, then print the table; the last line on stdout is results.json.

    Raises UserError in the end if a run failed.
    """
    quiet_libraries()
    sweep = Sweep(config, build_recipes(config))
    if config.list:
        sweep.print_commands()
        return
    slots = find_slots(config.gpus, config.max_parallel)
    with explaining(sweep.folder, "then the same command goes on from here"):
        sweep.open()
        for stage in sweep.stages():
            sweep.run(stage, slots)
            write_report(sweep)
        for line in write_out_of_fold(sweep):
            print(printable(line))
        print(write_report(sweep), flush=True)
    if sweep.failed:
        raise UserError(f"{len(sweep.failed)} of {len(sweep.runs)} runs failed; the same command tries them again")


if __name__ == "__main__":
    run_script(main, CONFIG)
