"""The default value of every key of the toolbox; trainers and datasets add their own keys to this tree."""

from __future__ import annotations

from .node import CfgNode as CN


def build_defaults() -> CN:
    """Build a new tree with all defaults."""
    cfg = CN()
    cfg.VERSION = 1
    cfg.OUTPUT_DIR = "./output"  # folder of the run: logs, checkpoints, results
    cfg.RESUME = ""  # folder of an earlier run to go on from; "" looks into OUTPUT_DIR
    cfg.SEED = -1  # 0 or more: fixed; negative: unseeded
    cfg.USE_CUDA = True  # use a GPU when there is one
    cfg.VERBOSE = True  # say what is being loaded and built
    cfg.LOGGER = "tensorboard"  # wandb or mlflow: send curves and pictures there, too. Ours
    cfg.DIST = CN()
    cfg.DIST.TIMEOUT = 10.0  # minutes, above 0: how long a process of several waits for another one. Ours
    cfg.INPUT = _input()
    cfg.DATASET = _dataset()
    cfg.DATALOADER = _dataloader()
    cfg.MODEL = _model()
    cfg.OPTIM = _optim()
    cfg.TRAIN = _train()
    cfg.TEST = _test()
    cfg.TRAINER = _trainer()
    return cfg


def _input() -> CN:
    node = CN()
    node.SIZE = (224, 224)  # height, width in pixels
    node.INTERPOLATION = "bilinear"  # bilinear, bicubic or nearest
    node.SQUASH = False  # test images: True: both sides are resized to SIZE; False: the middle is cut out
    # JPEG files: full; or reduced to 1/2, 1/4 or 1/8, as far as the shorter side keeps twice max(SIZE) pixels. Ours
    node.DECODE = "full"
    node.TRANSFORMS = ()  # names of transforms; their order here does not matter
    node.NO_TRANSFORM = False  # True: items hold PIL images
    node.PIXEL_MEAN = [0.485, 0.456, 0.406]  # per channel, of values in [0, 1] (ImageNet)
    node.PIXEL_STD = [0.229, 0.224, 0.225]
    node.CROP_PADDING = 4  # random_crop: pixels added on each side
    node.RRCROP_SCALE = (0.08, 1.0)  # random_resized_crop: share of the image's area
    node.CUTOUT_N = 1  # cutout: number of holes
    node.CUTOUT_LEN = 16  # cutout: side of a hole in pixels
    node.GN_MEAN = 0.0  # gaussian_noise, in units of the normalized image
    node.GN_STD = 0.15
    node.RANDAUGMENT_N = 2  # operations per image
    node.RANDAUGMENT_M = 10  # strength, 0..30
    node.COLORJITTER_B = 0.4  # brightness
    node.COLORJITTER_C = 0.4  # contrast
    node.COLORJITTER_S = 0.4  # saturation
    node.COLORJITTER_H = 0.1  # hue, 0..0.5
    node.RGS_P = 0.2  # randomgrayscale: probability
    node.GB_P = 0.5  # gaussian_blur: probability
    node.GB_K = 21  # gaussian_blur: kernel side in pixels, odd
    return node


def _dataset() -> CN:
    node = CN()
    node.ROOT = ""  # folder that holds the datasets' folders
    node.NAME = ""  # registry name
    node.SOURCE_DOMAINS = ()
    node.TARGET_DOMAINS = ()
    node.NUM_LABELED = -1  # semi-supervised sets: number of labeled images in all
    node.NUM_SHOTS = -1  # training images per class; below 1: all
    node.VAL_PERCENT = 0.1  # share held out for validation, where a set has no own split
    node.STL10_FOLD = -1
    node.CIFAR_C_TYPE = ""
    node.CIFAR_C_LEVEL = 1
    node.ALL_AS_UNLABELED = False
    # Wrong training images, made on purpose (dassl/data/label_noise.py). Ours
    node.LABEL_NOISE = 0.0  # share of the training images that get the label of another class
    node.FOREIGN = 0.0  # share that is replaced by training images of the dataset FOREIGN_FROM, under the same labels
    node.FOREIGN_FROM = ""  # its registry name
    return node


def _dataloader() -> CN:
    node = CN()
    node.NUM_WORKERS = 4  # processes that load images, per loader; capped at the number of CPUs
    node.SKIP_BAD_IMAGES = False  # open every image first and go on without those that cannot be read. Ours
    # Training: MiB that decoded images may take in each process that loads them; 0: they are decoded every time. Ours
    node.CACHE_IMAGES = 0
    node.K_TRANSFORMS = 1  # training: how many augmented versions of each image
    node.RETURN_IMG0 = False  # also give the image without augmentation, as img0
    node.TRAIN_X = CN()
    node.TRAIN_X.SAMPLER = "RandomSampler"
    node.TRAIN_X.BATCH_SIZE = 32
    node.TRAIN_X.N_DOMAIN = 0  # RandomDomainSampler, SeqDomainSampler: domains per batch; 0: all
    node.TRAIN_X.N_INS = 16  # RandomClassSampler: images per class in a batch
    node.TRAIN_U = CN()
    node.TRAIN_U.SAME_AS_X = True  # take the four settings of TRAIN_X
    node.TRAIN_U.SAMPLER = "RandomSampler"
    node.TRAIN_U.BATCH_SIZE = 32
    node.TRAIN_U.N_DOMAIN = 0
    node.TRAIN_U.N_INS = 16
    node.TEST = CN()
    node.TEST.SAMPLER = "SequentialSampler"
    node.TEST.BATCH_SIZE = 32
    return node


def _model() -> CN:
    node = CN()
    node.INIT_WEIGHTS = ""  # checkpoint to start from
    node.BACKBONE = CN()
    node.BACKBONE.NAME = ""
    node.BACKBONE.PRETRAINED = True
    node.HEAD = CN()
    node.HEAD.NAME = ""
    node.HEAD.HIDDEN_LAYERS = ()
    node.HEAD.ACTIVATION = "relu"
    node.HEAD.BN = True
    node.HEAD.DROPOUT = 0.0
    return node


def _optim() -> CN:
    node = CN()
    node.NAME = "adam"  # adam, amsgrad, adamw, sgd, rmsprop or radam
    node.LR = 0.0003
    node.WEIGHT_DECAY = 5e-4
    node.MOMENTUM = 0.9  # sgd, rmsprop
    node.SGD_DAMPNING = 0  # spelt as the configs in use spell it
    node.SGD_NESTEROV = False
    node.RMSPROP_ALPHA = 0.99
    node.ADAM_BETA1 = 0.9  # the Adam family
    node.ADAM_BETA2 = 0.999
    node.ADAM_EPS = 1e-8  # the Adam family: added to the denominator, > 0 (torch's default). Ours
    node.STAGED_LR = False  # NEW_LAYERS learn at LR, the others at LR * BASE_LR_MULT
    node.NEW_LAYERS = ()
    node.BASE_LR_MULT = 0.1
    node.LR_SCHEDULER = "single_step"  # single_step, multi_step or cosine
    node.LR_UNIT = "epoch"  # when the rate moves: every epoch, or every optimizer step. Ours
    node.STEPSIZE = (-1,)  # in LR_UNIT; single_step: period (<= 0: MAX_EPOCH), multi_step: milestones
    node.GAMMA = 0.1  # factor at each step of single_step and multi_step
    node.MAX_EPOCH = 10
    node.WARMUP_EPOCH = -1  # in LR_UNIT; 0 or less: no warm-up
    node.WARMUP_TYPE = "linear"  # linear or constant
    node.WARMUP_CONS_LR = 1e-5  # constant: the learning rate of the whole warm-up
    node.WARMUP_MIN_LR = 1e-5  # linear: the learning rate of its first unit
    node.WARMUP_RECOUNT = True  # the main schedule starts counting after the warm-up
    return node


def _train() -> CN:
    node = CN()
    node.CHECKPOINT_FREQ = 0  # epochs between two numbered checkpoints, which all stay; below 1: only the last's
    # A run can also be resumed from the end of an epoch (not of every short one: saving takes a tenth of the time at
    # most) and from the checkpoints that these two add. Both are 0 or more, 0: off. Ours, as the next two.
    node.CHECKPOINT_STEPS = 0  # steps of the optimizer between two such checkpoints
    node.CHECKPOINT_MINUTES = 0.0  # minutes between two
    node.CHECKPOINTS_KEPT = 2  # how many of them stay, the newest, 1 or more: where one is damaged, the next serves
    node.FORCE_RESUME = False  # go on from a checkpoint that was made with other settings
    node.PRINT_FREQ = 10  # batches between two progress lines
    # When the loss or gradients of a step are NaN or infinite: stop the run before the step changes anything, or leave
    # the step out (skip). Ours
    node.ON_NAN = "stop"
    node.ON_NAN_LIMIT = 10  # with skip: most steps left out, at least 1; the next such step stops the run
    node.COUNT_ITER = "train_x"  # which loader sets an epoch's length: train_x, train_u or smaller_one
    return node


def _test() -> CN:
    node = CN()
    node.EVALUATOR = "Classification"
    node.PER_CLASS_RESULT = False
    node.COMPUTE_CMAT = False  # save the confusion matrix to cmat.pt
    node.NO_TEST = False  # do not test after training
    node.PREDICTIONS_MB = 20  # limit, in million bytes, of predictions saved in the run's folder for figures; 0: none
    node.SPLIT = "test"  # test or val
    node.FINAL_MODEL = "last_step"  # last_step or best_val
    return node


def _trainer() -> CN:
    """Build the nodes of upstream's own trainers, whose keys keep upstream's YAML files mergeable.

    None of these trainers is in this project.
    """
    node = CN()
    node.NAME = ""
    node.MCD = CN({"N_STEP_F": 4})
    node.MME = CN({"LMDA": 0.1})
    node.CDAC = CN(
        {
            "CLASS_LR_MULTI": 10,
            "RAMPUP_COEF": 30,
            "RAMPUP_ITRS": 1000,
            "TOPK_MATCH": 5,
            "P_THRESH": 0.95,
            "STRONG_TRANSFORMS": (),
        }
    )
    node.SE = CN({"EMA_ALPHA": 0.999, "CONF_THRE": 0.95, "RAMPUP": 300})
    node.M3SDA = CN({"LMDA": 0.5, "N_STEP_F": 4})
    node.DAEL = CN({"WEIGHT_U": 0.5, "CONF_THRE": 0.95, "STRONG_TRANSFORMS": ()})
    node.DAELDG = CN({"WEIGHT_U": 0.5, "CONF_THRE": 0.95, "STRONG_TRANSFORMS": ()})
    node.CROSSGRAD = CN({"EPS_F": 1.0, "EPS_D": 1.0, "ALPHA_F": 0.5, "ALPHA_D": 0.5})
    node.DDAIG = CN(
        {"G_ARCH": "", "LMDA": 0.3, "CLAMP": False, "CLAMP_MIN": -1.0, "CLAMP_MAX": 1.0, "WARMUP": 0, "ALPHA": 0.5}
    )
    node.DOMAINMIX = CN({"TYPE": "crossdomain", "ALPHA": 1.0, "BETA": 1.0})
    node.ENTMIN = CN({"LMDA": 1e-3})
    node.MEANTEACHER = CN({"WEIGHT_U": 1.0, "EMA_ALPHA": 0.999, "RAMPUP": 5})
    node.MIXMATCH = CN({"WEIGHT_U": 100.0, "TEMP": 2.0, "MIXUP_BETA": 0.75, "RAMPUP": 20000})
    node.FIXMATCH = CN({"WEIGHT_U": 1.0, "CONF_THRE": 0.95, "STRONG_TRANSFORMS": ()})
    return node
