"""Thin callbacks for trainers of other libraries, one file each; import the file whose library is installed."""
