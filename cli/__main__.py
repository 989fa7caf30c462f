"""The program as a module, for launchers: ``torchrun -m vdcompress.cli finetune``."""

from vdcompress.cli.app import main

if __name__ == "__main__":
    main()
