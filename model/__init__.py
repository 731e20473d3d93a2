"""miss-IWEM: learning from images with holes, and completing them."""
