"""Sources of images, training views, augmentation and loaders.

``base`` has the data module that every source of images extends (``folder``, ``shards``, ``torchvision``, ...). A batch
of training views comes about in this order: ``sampler`` (which images) -> ``images`` and ``decoding`` -> ``views`` and
``randomness`` (which views) -> ``crops`` -> ``datasets`` -> ``loader`` -> ``batches`` and ``augment`` (on the device).
"""
