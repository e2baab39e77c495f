"""What makes the accuracies of a study say nothing about hardware, as far as it shows before they are measured."""


def doubts(untrained: bool, outputs: int | None, classes: int | None) -> list[str]:
    """What makes a study's accuracies say nothing about hardware, whatever they are: a sentence each."""
    said = []
    if untrained:
        said.append("No weights were given, so this network is untrained: give its checkpoint with weights.")
    if outputs is not None and classes is not None and outputs != classes:
        said.append(
            f"The network has {outputs:,} outputs and the data have {classes:,} classes, so label 0 is taken for "
            "output 0 and so on: are these the data that the weights belong to?"
        )
    return said
