"""Training: a small loop that resumes bit for bit, and the recipes that need one."""

from recoup.training.loop import Settings, Stage, Trained, train
from recoup.training.pipelined import train_pipelined
from recoup.training.two_stage import fine_tune

__all__ = ["Settings", "Stage", "Trained", "fine_tune", "train", "train_pipelined"]
