"""The command `cxr`: one file per command, each thin; heavy imports happen inside the commands."""
