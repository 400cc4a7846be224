"""What ringflash raises when a setting cannot work."""


class ConfigError(ValueError):
    """A setting, file or folder that cannot work.

    The message is one line for the user: it names the key (or the file), the value it has, and what is possible.
    The trainer prints it alone, without a traceback.
    """
