from dinoengine.data.datasets.digits import Digits
from dinoengine.data.datasets.fashion_mnist import FashionMNIST
from dinoengine.data.datasets.file_list import FileList
from dinoengine.data.datasets.hugging_face import HuggingFaceDataset
from dinoengine.data.datasets.image_folder import ImageFolder
from dinoengine.data.datasets.imagenet import ImageNet
from dinoengine.data.datasets.mask_folder import MaskFolder
from dinoengine.data.datasets.synthetic import Synthetic
from dinoengine.data.datasets.tar_shards import ImageNet22k, WebDataset
from dinoengine.data.datasets.torchvision_dataset import TorchvisionDataset
from dinoengine.data.datasets.voc2007 import VOC2007

__all__ = [
    "VOC2007",
    "Digits",
    "FashionMNIST",
    "FileList",
    "HuggingFaceDataset",
    "ImageFolder",
    "ImageNet",
    "ImageNet22k",
    "MaskFolder",
    "Synthetic",
    "TorchvisionDataset",
    "WebDataset",
]
