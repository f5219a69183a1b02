from dinoengine.data.datasets.digits import Digits
from dinoengine.data.datasets.image_folder import ImageFolder
from dinoengine.data.datasets.synthetic import Synthetic

__all__ = ["Digits", "ImageFolder", "Synthetic"]
