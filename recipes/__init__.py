"""The recipes that come with vdcompress: one YAML file each."""
