"""The files of an output folder: written, read, combined, shown. Does not know who ran the frames, or where."""
