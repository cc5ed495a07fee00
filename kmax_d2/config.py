"""Every option of the project, with its default and its meaning. The defaults are those of ResNet-50 on COCO."""

from detectron2.config import CfgNode


def add_kmax_config(cfg: CfgNode) -> None:
    """Adds the options of kMaX-DeepLab to a Detectron2 config, in place."""
    cfg.INPUT.FORMAT = "RGB"  # channel order of the images; nothing else is supported
    cfg.INPUT.DATASET_MAPPER_NAME = "PanopticTrainMapper"  # training mapper, by its name in MAPPER_REGISTRY
    cfg.INPUT.CROP_SIZE = [1281, 1281]  # height and width of training crops and padded test images, in pixels
    cfg.INPUT.FIT_CROP = True  # resize each image to just fit the crop, before any random scaling
    # Detectron2's sizes for its DefaultPredictor; load_config computes them from CROP_SIZE and FIT_CROP.
    cfg.INPUT.MIN_SIZE_TEST = -1
    cfg.INPUT.MAX_SIZE_TEST = -1  # the same
    cfg.INPUT.SCALE_RANGE = [0.3, 1.7]  # smallest and largest random scale of a training image
    cfg.INPUT.SCALE_STEPS = 15  # number of evenly spaced scales to draw from; 0 draws from the whole range
    cfg.INPUT.COLOR_POLICY = True  # distort colors with the policy of the official training
    cfg.INPUT.COLOR_LEVEL = 1.0  # strength of the color policy, as a factor on its levels; 0.2 on Cityscapes
    cfg.INPUT.COPY_PASTE = True  # paste segments of a second random image, drawn at half the scales, onto each image
    cfg.INPUT.SKIP_BROKEN = False  # skip and log unreadable training samples instead of stopping at the first

    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False  # leave out images with nothing but void and crowds
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 1.0  # of "RandomSubsetTrainingSampler", above 0; some versions do not have it
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False  # Detectron2's; not needed, because all crops have the same size

    # Your own training data in COCO panoptic format: [image folder, PNG folder, JSON file]. Replaces DATASETS.TRAIN.
    cfg.DATASETS.OWN_TRAIN = []
    # The same for the test data. Replaces DATASETS.TEST.
    cfg.DATASETS.OWN_TEST = []

    cfg.SOLVER.BASE_LR = 5e-4  # peak learning rate, reached at the end of the warm-up
    cfg.SOLVER.WEIGHT_DECAY = 0.05  # AdamW's weight decay, applied to kernels only
    cfg.SOLVER.ADAM_EPS = 1e-7  # AdamW's epsilon
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1  # learning rate of the backbone, as a fraction of the others'
    cfg.SOLVER.POLY_POWER = 0.9  # the learning rate falls as (1 - iteration / MAX_ITER) ** POLY_POWER
    cfg.SOLVER.WARMUP_ITERS = 5000  # iterations in which the learning rate rises linearly from 0
    cfg.SOLVER.AMP.PRECISION = "bfloat16"  # or "float16"; used only if SOLVER.AMP.ENABLED
    cfg.SOLVER.ACCUMULATE = 1  # parts of a step's IMS_PER_BATCH images that go through the model one after another
    # Parts that do not learn, of "backbone", "pixel_decoder", "transformer_decoder", and "semantic_head".
    cfg.SOLVER.FREEZE = []
    # In a vision transformer, factor on the learning rate from each block to the one before.
    cfg.SOLVER.LAYER_DECAY = 1.0
    cfg.SOLVER.BEST_METRIC = "panoptic_seg/PQ"  # model_best.pth has the weights of its highest value; "" saves none
    cfg.SOLVER.PATIENCE = 0  # evaluations in a row without a better BEST_METRIC that end the training; 0 for no limit
    cfg.SOLVER.TRACKERS = []  # "wandb", "mlflow", or both, which get all metrics; their packages must be installed
    cfg.SOLVER.KEEP_CHECKPOINTS = 0  # the number of regular checkpoints to keep, the newest; 0 keeps all
    cfg.SOLVER.EMA = CfgNode()
    cfg.SOLVER.EMA.ENABLED = False  # average the weights over training, then evaluate and save both kinds
    cfg.SOLVER.EMA.DECAY = 0.9998  # fraction of the average that one step keeps, from 0 to below 1
    cfg.SOLVER.EMA.WARMUP = True  # start with a smaller decay: 1 - step ** (-2/3) until that reaches DECAY

    cfg.TEST.PICTURES = 4  # test images whose predictions are drawn for TensorBoard after each of EVAL_PERIOD

    cfg.MODEL.META_ARCHITECTURE = "KMaXDeepLab"  # the whole model, by its name in META_ARCH_REGISTRY
    # Backbone: "KMaXResNet", "KMaXMaXS", "KMaXConvNeXt", "KMaXTimm", or any other name in BACKBONE_REGISTRY.
    cfg.MODEL.BACKBONE.NAME = "KMaXResNet"
    cfg.MODEL.PIXEL_MEAN = [127.5, 127.5, 127.5]  # subtracted from each channel; pixel values are 0 to 255
    cfg.MODEL.PIXEL_STD = [127.5, 127.5, 127.5]  # each channel is divided by it; the defaults scale to [-1, 1]

    kmax = cfg.MODEL.KMAX = CfgNode()
    kmax.NUM_CLASSES = 133  # classes without void; 0 takes the number from the dataset, as your own data always do
    kmax.CHECKPOINT_BLOCKS = False  # activation checkpointing: less memory in training for more time
    # Batch norm of all parts, by Detectron2's name; "SyncBN" becomes "naiveSyncBN" on a CPU or in a single process.
    kmax.NORM = "SyncBN"
    # Mode of torch.compile: "" for none, "default", or, with CUDA graphs for inputs of a fixed size,
    # "reduce-overhead" or "max-autotune".
    kmax.COMPILE = ""

    kmax.RESNET = CfgNode()  # read by "KMaXResNet"
    kmax.RESNET.BLOCKS = [3, 4, 6, 3]  # blocks in stages 2 to 5
    kmax.RESNET.WIDTHS = [64, 128, 256, 512]  # base widths of stages 2 to 5; outputs have 4 times as many channels
    kmax.RESNET.STEM_WIDTH = 64  # channels of the stem
    # The form of torchvision, timm, and Detectron2, with a max pool and activated outputs, instead of kMaX-DeepLab's.
    kmax.RESNET.STANDARD = False

    kmax.MAXS = CfgNode()  # read by "KMaXMaXS"
    kmax.MAXS.BLOCKS = [3, 4, 6, 3]  # blocks in stages 2 to 5
    kmax.MAXS.WIDTHS = [64, 128, 256, 512]  # base widths of stages 2 to 5; outputs have 4 times as many channels
    kmax.MAXS.STEM_WIDTHS = [64, 64, 128]  # channels of the stem's three convolutions
    # Drop path rates of stages 2 to 5; the first block of a stage has the rate of the stage before.
    kmax.MAXS.DROP_PATH = [0.0, 0.0, 0.15, 0.2]

    kmax.CONVNEXT = CfgNode()  # read by "KMaXConvNeXt"
    kmax.CONVNEXT.DEPTHS = [3, 3, 9, 3]  # blocks in stages 2 to 5
    kmax.CONVNEXT.WIDTHS = [96, 192, 384, 768]  # channels of stages 2 to 5
    kmax.CONVNEXT.DROP_PATH = 0.3  # drop path rate of the last block, rising linearly from 0 at the first

    kmax.TIMM = CfgNode()  # read by "KMaXTimm"
    kmax.TIMM.NAME = "resnet50"  # any timm model that provides feature maps, or a vision transformer of timm's
    kmax.TIMM.PRETRAINED = False  # start from timm's weights, downloaded once; ignored if MODEL.WEIGHTS is set

    kmax.PIXEL_DECODER = CfgNode()
    kmax.PIXEL_DECODER.NAME = "KMaXPixelDecoder"  # by its name in PIXEL_DECODER_REGISTRY
    kmax.PIXEL_DECODER.IN_FEATURES = ["stage5", "stage4", "stage3", "stage2"]  # backbone maps to read, coarse to fine
    kmax.PIXEL_DECODER.WIDTHS = [512, 256, 128, 64]  # base width of each stage; outputs have 4 times as many channels
    kmax.PIXEL_DECODER.BLOCKS = [1, 5, 1, 1]  # blocks in each stage
    # Type of the blocks in each stage, in PIXEL_BLOCK_REGISTRY: "axial" or "bottleneck".
    kmax.PIXEL_DECODER.KINDS = ["axial", "axial", "bottleneck", "bottleneck"]
    kmax.PIXEL_DECODER.DILATION = 2  # dilation of the bottlenecks; set 1 for weights of the public PyTorch port

    kmax.TRANSFORMER_DECODER = CfgNode()
    kmax.TRANSFORMER_DECODER.NAME = "KMaXTransformerDecoder"  # by its name in TRANSFORMER_DECODER_REGISTRY
    kmax.TRANSFORMER_DECODER.NUM_QUERIES = 128  # queries, that is, cluster centers
    kmax.TRANSFORMER_DECODER.TRAINING_QUERIES = 0  # drop query: random queries kept in each training step; 0 keeps all
    # "KMeansCrossAttention", or for the ablation "SoftmaxCrossAttention", "SharedSoftmaxCrossAttention", or
    # "GumbelCrossAttention".
    kmax.TRANSFORMER_DECODER.CROSS_ATTENTION = "KMeansCrossAttention"
    kmax.TRANSFORMER_DECODER.DECODERS = [2, 2, 2]  # kMaX decoders on each of the coarsest maps, coarse to fine
    kmax.TRANSFORMER_DECODER.CHANNELS = 256  # channels of the cluster centers and of the projected pixels
    kmax.TRANSFORMER_DECODER.FFN_CHANNELS = 2048  # hidden channels of the feed-forward networks
    kmax.TRANSFORMER_DECODER.KEY_CHANNELS = 128  # channels of queries and keys, over all heads
    kmax.TRANSFORMER_DECODER.NUM_HEADS = 8  # attention heads; must divide KEY_CHANNELS and CHANNELS
    kmax.TRANSFORMER_DECODER.FEATURE_CHANNELS = 128  # channels of the pixel features and mask embeddings
    kmax.TRANSFORMER_DECODER.DROP_PATH = 0.2  # drop path rate of each update of the centers

    kmax.SEMANTIC_HEAD = CfgNode()
    # Auxiliary semantic head, used in training only: "ASPPSemanticHead", or "PointwiseSemanticHead" for Cityscapes.
    kmax.SEMANTIC_HEAD.NAME = "ASPPSemanticHead"
    kmax.SEMANTIC_HEAD.CHANNELS = 256  # channels of the head
    kmax.SEMANTIC_HEAD.LOW_LEVEL_CHANNELS = [64, 32]  # channels that stage3 and stage2 are projected to

    kmax.LOSS = CfgNode()
    kmax.LOSS.NAME = "Criterion"  # by its name in CRITERION_REGISTRY
    kmax.LOSS.PQ_WEIGHT = 3.0  # weight of both terms of the PQ-style loss
    kmax.LOSS.MASK_ID_WEIGHT = 0.3  # weight of the mask-ID cross-entropy
    kmax.LOSS.INSTANCE_WEIGHT = 1.0  # weight of the pixel-wise instance discrimination
    kmax.LOSS.SEMANTIC_WEIGHT = 1.0  # weight of the auxiliary semantic loss; 0 removes the head
    kmax.LOSS.NUM_SAMPLES = 4096  # pixels sampled per image for the instance and the semantic loss
    kmax.LOSS.INSTANCE_TEMPERATURE = 1.5  # sampling of the instance loss: the higher, the more from small masks
    kmax.LOSS.SEMANTIC_TEMPERATURE = 2.0  # the same for the semantic loss
    # Fraction of pixels, the hardest, in the semantic loss, from 0 to 1; 0 samples NUM_SAMPLES pixels instead.
    kmax.LOSS.SEMANTIC_HARD_SHARE = 0.0
    kmax.LOSS.SMALL_INSTANCE_AREA = 4096  # area in crop pixels below which things get the next weight
    kmax.LOSS.SMALL_INSTANCE_WEIGHT = 1.0  # weight of small things among the hardest pixels; 3 on Cityscapes
    kmax.LOSS.MIN_PQ_WEIGHT = 1e-5  # lower bound on the detached weights of the PQ-style loss

    test = kmax.TEST = CfgNode()
    test.PAD_TO_CROP = True  # pad images to INPUT.CROP_SIZE, as the official code does; else to the next 32k + 1
    # Merge on the padded crop, as the official code does; else at the original size and without area limits.
    test.MERGE_AT_CROP = True
    test.PRECISION = "float32"  # or "tf32", "bfloat16"; for evaluation, the demo, and pseudo-labels
    test.MERGING = "MaskWiseMerging"  # by its name in MERGING_REGISTRY
    test.PIXEL_THRESHOLD = 0.4  # mask probability above which a pixel belongs to a mask; at least 1/3
    test.THING_THRESHOLD = 0.7  # lowest class probability of a thing in the panoptic result
    test.STUFF_THRESHOLD = 0.5  # the same for stuff
    test.OVERLAP_THRESHOLD = 0.8  # fraction of a mask that must still be free for it to be pasted
    test.CLASS_POWER = 1.0  # masks are pasted in order of class probability ** CLASS_POWER * mask score ** MASK_POWER
    test.MASK_POWER = 1.0  # see CLASS_POWER; 0 on Cityscapes
    test.THING_AREA_LIMIT = 400  # smaller things become void, in pixels of the padded crop
    test.STUFF_AREA_LIMIT = 6400  # the same for stuff
    test.PANOPTIC_ON = True  # return panoptic results
    test.SEMANTIC_ON = True  # return semantic results
    test.INSTANCE_ON = True  # return instance results
    test.SEMANTIC = "query"  # class of each pixel's best query (official); "marginal" sums over all queries
    test.INSTANCE = "query"  # the mask of each query; "panoptic" takes instances from the panoptic result (official)
    test.MAX_INSTANCES = 100  # instances returned per image, those of the highest scores
    test.SAVE_PREDICTIONS = ""  # folder for predictions in the formats of the benchmarks' servers; "" saves none
