"""Give a method's author the trainers to derive from, the learner that is saved, and the keys of its settings.

EncoderTrainer       trains what sits inside CLIP's encoders (prompts, adapters)
PromptTrainer        is one for learnt prompts, with what CoOp and its successors share
CountedTrainer       is one whose training is counted in steps per shot, in one stage or several
ViewsTrainer         is its base, which keeps what frozen blocks make of seeded views of the images (INPUT.VIEWS)
deep_prompts         has an EncoderTrainer for tokens in front of blocks of both encoders; import it by this name
representations      has an EncoderTrainer for tokens in later blocks and a second image feature; likewise
CacheLearner         is a FeatureLearner with a cache of training images
FeatureTrainer       trains or fits a FeatureLearner on features of the frozen CLIP, which are computed once
AnchoredTrainer      trains one matrix that features go through, and holds it near where it starts
TransductiveTrainer  is a FeatureTrainer that classifies test images together
CLIPTrainer          is the base class of all, for methods that fit none
"""

from .anchored_trainer import AnchoredConfig, AnchoredLearner, AnchoredTrainer
from .clip_trainer import CLIPTrainer
from .counted_trainer import CountedTrainer
from .dept import DePTKeys
from .encoder_trainer import EncoderTrainer
from .feature_learner import CacheLearner, FeatureLearner, FeatureNetwork, PooledLearner
from .feature_trainer import CorrectedKeys, FeatureTrainer
from .keys import MethodConfig, kept_views, key, precision
from .learner import Classifier, Learner, class_rows, known_rows, pack_record, unpack_record
from .learner_trainer import LearnerTrainer, checkpoint_path
from .prompts import PromptClassifier, PromptLearner, PromptOutputs, PromptTrainer, distance_to, initial_context
from .schedule import build_optimizer_with_eps, count_steps
from .transductive import SupportLearner, TransductiveConfig, TransductiveTrainer
from .views_trainer import ViewsTrainer

__all__ = [
    "AnchoredConfig",
    "AnchoredLearner",
    "AnchoredTrainer",
    "CLIPTrainer",
    "CacheLearner",
    "Classifier",
    "CorrectedKeys",
    "CountedTrainer",
    "DePTKeys",
    "EncoderTrainer",
    "FeatureLearner",
    "FeatureNetwork",
    "FeatureTrainer",
    "Learner",
    "LearnerTrainer",
    "MethodConfig",
    "PooledLearner",
    "PromptClassifier",
    "PromptLearner",
    "PromptOutputs",
    "PromptTrainer",
    "SupportLearner",
    "TransductiveConfig",
    "TransductiveTrainer",
    "ViewsTrainer",
    "build_optimizer_with_eps",
    "checkpoint_path",
    "class_rows",
    "count_steps",
    "distance_to",
    "initial_context",
    "kept_views",
    "key",
    "known_rows",
    "pack_record",
    "precision",
    "unpack_record",
]
