"""What a method's author reads: the trainers to derive from, the learner that is saved, and the checks of keys.

EncoderTrainer   trains what sits inside CLIP's encoders (prompts, adapters); images go through them in every step
FeatureTrainer   trains or fits a FeatureLearner on features of the frozen CLIP, which are computed once
CLIPTrainer      is the common ground, for what fits neither
"""

from .checks import check_bool, check_choice, check_number, check_whole, check_words
from .clip_trainer import CLIPTrainer
from .encoder_trainer import EncoderTrainer
from .feature_learner import FeatureLearner, FeatureNetwork
from .feature_trainer import FeatureTrainer
from .learner import Classifier, Learner, class_rows, pack_record, unpack_record
from .learner_trainer import LearnerTrainer, checkpoint_path
from .schedule import build_optimizer_with_eps, count_steps

__all__ = [
    "CLIPTrainer",
    "Classifier",
    "EncoderTrainer",
    "FeatureLearner",
    "FeatureNetwork",
    "FeatureTrainer",
    "Learner",
    "LearnerTrainer",
    "build_optimizer_with_eps",
    "check_bool",
    "check_choice",
    "check_number",
    "check_whole",
    "check_words",
    "checkpoint_path",
    "class_rows",
    "count_steps",
    "pack_record",
    "unpack_record",
]
