"""Imported once by the process that forks training runs, so that each fork starts at once."""

import peft
import torch._dynamo
import transformers.trainer

import student_train.stage.stages

__all__ = ["peft", "student_train", "torch", "transformers"]
