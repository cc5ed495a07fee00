"""Every option of the project, once, with a default that works. Defaults are those of ResNet-50 on COCO."""

from __future__ import annotations

from detectron2.config import CfgNode


def add_kmax_config(cfg: CfgNode) -> None:
    """Adds the options of kMaX-DeepLab to a Detectron2 config, in place."""
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.DATASET_MAPPER_NAME = "PanopticTrainMapper"  # mapper of the training images
    cfg.INPUT.CROP_SIZE = [1281, 1281]  # (height, width) of training crops and of padded test images
    cfg.INPUT.FIT_CROP = True  # resize images so that they just fit the crop before anything else
    cfg.INPUT.SCALE_RANGE = [0.3, 1.7]  # random scales of the resized image
    cfg.INPUT.SCALE_STEPS = 15  # number of evenly spaced scales; 0 draws from the whole range
    cfg.INPUT.COLOR_POLICY = True  # the color policy of the official training
    cfg.INPUT.COLOR_LEVEL = 1.0  # factor on the policy's levels; 0.2 on Cityscapes
    cfg.INPUT.COPY_PASTE = True  # paste segments of a second random image, at half the scales, over each image
    cfg.INPUT.SKIP_BROKEN = False  # leave broken training samples out, with a count in the log, instead of stopping

    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False  # all crops have one size

    # Own data in COCO panoptic format: (image folder, PNG folder, JSON file), used instead of DATASETS.TRAIN and TEST.
    cfg.DATASETS.OWN_TRAIN = []
    cfg.DATASETS.OWN_TEST = []

    cfg.SOLVER.BASE_LR = 5e-4
    cfg.SOLVER.WEIGHT_DECAY = 0.05  # on kernels only
    cfg.SOLVER.ADAM_EPS = 1e-7
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1  # factor on the backbone's learning rate
    cfg.SOLVER.POLY_POWER = 0.9
    cfg.SOLVER.WARMUP_ITERS = 5000
    cfg.SOLVER.AMP.PRECISION = "bfloat16"  # or "float16"; read where SOLVER.AMP.ENABLED
    # Averaged weights, evaluated and saved beside the raw ones: see kmax_d2/engine/ema.py.
    cfg.SOLVER.EMA = CfgNode()
    cfg.SOLVER.EMA.ENABLED = False
    cfg.SOLVER.EMA.DECAY = 0.9998  # share of the average that one step keeps
    cfg.SOLVER.EMA.WARMUP = True  # smaller decay early on: 1 - step^(-2/3) until that reaches DECAY

    cfg.MODEL.META_ARCHITECTURE = "KMaXDeepLab"
    cfg.MODEL.BACKBONE.NAME = "KMaXResNet"
    cfg.MODEL.PIXEL_MEAN = [127.5, 127.5, 127.5]
    cfg.MODEL.PIXEL_STD = [127.5, 127.5, 127.5]

    kmax = cfg.MODEL.KMAX = CfgNode()
    kmax.NUM_CLASSES = 133  # without void; 0 takes it from the dataset, and own data always give theirs
    kmax.CHECKPOINT_BLOCKS = False  # activation checkpointing: training keeps only the inputs of blocks
    kmax.NORM = "SyncBN"  # batch norm of every part; on CPUs the matching one is taken
    # torch.compile: "" for none, "default", or with CUDA graphs, for sizes that do not vary: "reduce-overhead" and
    # "max-autotune".
    kmax.COMPILE = ""

    kmax.RESNET = CfgNode()
    kmax.RESNET.BLOCKS = [3, 4, 6, 3]
    kmax.RESNET.WIDTHS = [64, 128, 256, 512]
    kmax.RESNET.STEM_WIDTH = 64
    kmax.RESNET.STANDARD = False  # the form of torchvision, timm and Detectron2: max pool, activated outputs

    kmax.MAXS = CfgNode()
    kmax.MAXS.BLOCKS = [3, 4, 6, 3]
    kmax.MAXS.WIDTHS = [64, 128, 256, 512]
    kmax.MAXS.STEM_WIDTHS = [64, 64, 128]
    kmax.MAXS.DROP_PATH = [0.0, 0.0, 0.15, 0.2]  # of stages 2 to 5; a stage's first block has the stage before's

    kmax.CONVNEXT = CfgNode()
    kmax.CONVNEXT.DEPTHS = [3, 3, 9, 3]
    kmax.CONVNEXT.WIDTHS = [96, 192, 384, 768]
    kmax.CONVNEXT.DROP_PATH = 0.3  # of the last block, linear from 0 at the first

    kmax.TIMM = CfgNode()
    kmax.TIMM.NAME = "resnet50"  # any model of timm that gives feature maps
    kmax.TIMM.PRETRAINED = False  # start from timm's weights, downloaded once; read only where MODEL.WEIGHTS is empty

    kmax.PIXEL_DECODER = CfgNode()
    kmax.PIXEL_DECODER.NAME = "KMaXPixelDecoder"
    kmax.PIXEL_DECODER.IN_FEATURES = ["stage5", "stage4", "stage3", "stage2"]  # coarse to fine
    kmax.PIXEL_DECODER.WIDTHS = [512, 256, 128, 64]  # a stage's output has four times as many channels
    kmax.PIXEL_DECODER.BLOCKS = [1, 5, 1, 1]
    kmax.PIXEL_DECODER.KINDS = ["axial", "axial", "bottleneck", "bottleneck"]
    kmax.PIXEL_DECODER.DILATION = 2  # of the bottlenecks; 1 for weights of the public PyTorch port

    kmax.TRANSFORMER_DECODER = CfgNode()
    kmax.TRANSFORMER_DECODER.NAME = "KMaXTransformerDecoder"
    kmax.TRANSFORMER_DECODER.NUM_QUERIES = 128
    kmax.TRANSFORMER_DECODER.TRAINING_QUERIES = 0  # drop query: a random choice of so many in training; 0 keeps all
    kmax.TRANSFORMER_DECODER.CROSS_ATTENTION = "KMeansCrossAttention"  # the ablation's others: see the README
    kmax.TRANSFORMER_DECODER.DECODERS = [2, 2, 2]  # decoders on each of the first pixel decoder maps
    kmax.TRANSFORMER_DECODER.CHANNELS = 256
    kmax.TRANSFORMER_DECODER.FFN_CHANNELS = 2048
    kmax.TRANSFORMER_DECODER.KEY_CHANNELS = 128
    kmax.TRANSFORMER_DECODER.NUM_HEADS = 8
    kmax.TRANSFORMER_DECODER.FEATURE_CHANNELS = 128  # of the pixel features
    kmax.TRANSFORMER_DECODER.DROP_PATH = 0.2

    kmax.SEMANTIC_HEAD = CfgNode()
    kmax.SEMANTIC_HEAD.NAME = "ASPPSemanticHead"  # or "PointwiseSemanticHead", Cityscapes'
    kmax.SEMANTIC_HEAD.CHANNELS = 256
    kmax.SEMANTIC_HEAD.LOW_LEVEL_CHANNELS = [64, 32]  # of stage3 and stage2

    kmax.LOSS = CfgNode()
    kmax.LOSS.PQ_WEIGHT = 3.0
    kmax.LOSS.MASK_ID_WEIGHT = 0.3
    kmax.LOSS.INSTANCE_WEIGHT = 1.0
    kmax.LOSS.SEMANTIC_WEIGHT = 1.0  # 0 leaves the semantic head out
    kmax.LOSS.NUM_SAMPLES = 4096  # pixels for the instance and semantic terms
    kmax.LOSS.INSTANCE_TEMPERATURE = 1.5
    kmax.LOSS.SEMANTIC_TEMPERATURE = 2.0
    kmax.LOSS.SEMANTIC_HARD_SHARE = 0.0  # share of all pixels, the hardest, in the semantic term; 0 samples pixels
    kmax.LOSS.SMALL_INSTANCE_AREA = 4096  # things of fewer pixels in the crop have the next weight in that share
    kmax.LOSS.SMALL_INSTANCE_WEIGHT = 1.0  # 3 on Cityscapes
    kmax.LOSS.MIN_PQ_WEIGHT = 1e-5  # floor of the detached weights of the PQ-style terms

    test = kmax.TEST = CfgNode()
    test.PAD_TO_CROP = True  # pad test images to INPUT.CROP_SIZE, as officially; else to the next 32k + 1
    test.MERGE_AT_CROP = True  # merge on the padded crop, as officially; else at the original size, without area limits
    test.PRECISION = "float32"  # or "tf32", "bfloat16"; of evaluation, demo and pseudo-labels
    test.PIXEL_THRESHOLD = 0.4
    test.THING_THRESHOLD = 0.7
    test.STUFF_THRESHOLD = 0.5
    test.OVERLAP_THRESHOLD = 0.8
    test.CLASS_POWER = 1.0
    test.MASK_POWER = 1.0
    test.THING_AREA_LIMIT = 400
    test.STUFF_AREA_LIMIT = 6400
    test.PANOPTIC_ON = True
    test.SEMANTIC_ON = True
    test.INSTANCE_ON = True
    test.SEMANTIC = "query"  # class of each pixel's best query, as officially; "marginal" sums over the queries
    test.INSTANCE = "query"  # each query's mask; "panoptic" cuts instances from the merged map, as officially
    test.MAX_INSTANCES = 100  # instances kept for each image
    test.SAVE_PREDICTIONS = ""  # folder for predictions in the formats that the benchmarks' servers take
