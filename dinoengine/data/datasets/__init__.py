from dinoengine.data.datasets.digits import Digits
from dinoengine.data.datasets.fashion_mnist import FashionMNIST
from dinoengine.data.datasets.image_folder import ImageFolder
from dinoengine.data.datasets.mask_folder import MaskFolder
from dinoengine.data.datasets.synthetic import Synthetic

__all__ = ["Digits", "FashionMNIST", "ImageFolder", "MaskFolder", "Synthetic"]
