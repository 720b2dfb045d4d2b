"""Model folders: written from runs, described by cards, loaded as timm backbones."""
