"""An image and a question to masks. Does not know about files of images, output folders or runs."""
