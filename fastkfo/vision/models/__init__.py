"""Networks of the few-shot vision literature, initialised and computing as learn2learn's do.

Each network is `classifier(features(x))`; each `...Backbone` is a `features` on its own. There are
no pretrained weights here, but learn2learn's load: the keys of the state dicts are the same.

Source: the interface is learn2learn 0.2.0's `vision.models`
(https://github.com/learnables/learn2learn).
"""

from fastkfo.vision.models import cnn4, resnet12, wrn28
from fastkfo.vision.models.cnn4 import (
    CNN4,
    CNN4Backbone,
    ConvBase,
    ConvBlock,
    LinearBlock,
    MiniImagenetCNN,
    OmniglotCNN,
    OmniglotFC,
    fc_init_,
    maml_init_,
    truncated_normal_,
)
from fastkfo.vision.models.resnet12 import ResNet12, ResNet12Backbone
from fastkfo.vision.models.wrn28 import WRN28, WRN28Backbone

__all__ = [
    "CNN4",
    "WRN28",
    "CNN4Backbone",
    "ConvBase",
    "ConvBlock",
    "LinearBlock",
    "MiniImagenetCNN",
    "OmniglotCNN",
    "OmniglotFC",
    "ResNet12",
    "ResNet12Backbone",
    "WRN28Backbone",
    "cnn4",
    "fc_init_",
    "maml_init_",
    "resnet12",
    "truncated_normal_",
    "wrn28",
]
