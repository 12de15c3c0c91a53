"""Reading images and labels, and turning them into the network's input."""

from .augment import TrainTransform
from .broken import drop_broken, find_broken
from .check import check_data
from .check_detection import check_detection_data
from .check_segmentation import check_segmentation_data
from .classification import DIGITS, ImageDataset, LabelledImages, load_labelled_images, read_split
from .detection import DetectionData, DetectionDataset, load_detection_data, load_held_out
from .detection_transforms import DetectionTransform
from .images import ImageSource, find_images, open_image
from .masks import MaskClasses
from .names import class_names
from .pack import pack_folder
from .problems import ProblemReport
from .scenes import write_scenes
from .segmentation import SegmentationData, SegmentationDataset, load_segmentation_data
from .segmentation_layout import SegmentationSample
from .segmentation_transforms import SegmentationEvalTransform, SegmentationTrainTransform
from .shards import PackedImage
from .transforms import EvalTransform, Preprocess

__all__ = [
    "DIGITS",
    "DetectionData",
    "DetectionDataset",
    "DetectionTransform",
    "EvalTransform",
    "ImageDataset",
    "ImageSource",
    "LabelledImages",
    "MaskClasses",
    "PackedImage",
    "Preprocess",
    "ProblemReport",
    "SegmentationData",
    "SegmentationDataset",
    "SegmentationEvalTransform",
    "SegmentationSample",
    "SegmentationTrainTransform",
    "TrainTransform",
    "check_data",
    "check_detection_data",
    "check_segmentation_data",
    "class_names",
    "drop_broken",
    "find_broken",
    "find_images",
    "load_detection_data",
    "load_held_out",
    "load_labelled_images",
    "load_segmentation_data",
    "open_image",
    "pack_folder",
    "read_split",
    "write_scenes",
]
