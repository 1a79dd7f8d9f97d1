"""What each process of `test_distributed.py` runs, with one argument: the folder to work in.

With POISON=STEP the last process spoils its loss in that step.
"""

import os
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from support.training_runs import Letters, llama, small_recipe
from w2a4.train import distributed, run
from w2a4.train.trainer import QATTrainer


class Watched(QATTrainer):
    def training_step(self, *args, **kwargs):
        sharded = [isinstance(p, DTensor) for p in self.model.parameters() if p.requires_grad]
        assert all(sharded) == any(sharded) == (distributed.world() > 1)
        last = self.args.process_index == distributed.world() - 1
        if last and self.state.global_step + 1 == int(os.environ.get("POISON", 0)):
            self.teacher.lm_head.weight.data.fill_(float("nan"))
        return super().training_step(*args, **kwargs)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    run.QATTrainer = Watched
    recipe = small_recipe(steps=4, batch_size=4, micro_batch=2)
    model = run.train(llama(), Letters(), recipe, folder / "work", progress=False)
    if distributed.is_main():
        model.save_pretrained(folder / "packed")
    distributed.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
