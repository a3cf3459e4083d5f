class Processor:
    @classmethod
    def from_directory(cls, directory, config):
        return None
