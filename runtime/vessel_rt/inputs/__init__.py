"""Image and DICOM files to RGB images, and what each is called. Does not know about models or results."""
