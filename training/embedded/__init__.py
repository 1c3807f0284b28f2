"""The embedded default: a small pretrained model and a small task, with the script that makes both."""
