"""The commands of `attnlab`, one file a subject; `attnlab_webui.cli` puts them together."""
