"""The paper behind each loss, as a BibTeX entry."""

_PAPERS = {
    "orpo": (
        "hong2024orpo",
        "ORPO: Monolithic Preference Optimization without Reference Model",
        "Jiwoo Hong and Noah Lee and James Thorne",
        2024,
        "2403.07691",
    ),
    "dpo": (
        "rafailov2023direct",
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "Rafael Rafailov and Archit Sharma and Eric Mitchell and Stefano Ermon and "
        "Christopher D. Manning and Chelsea Finn",
        2023,
        "2305.18290",
    ),
    "ipo": (
        "azar2023general",
        "A General Theoretical Paradigm to Understand Learning from Human Preferences",
        "Mohammad Gheshlaghi Azar and others",
        2023,
        "2310.12036",
    ),
    "simpo": (
        "meng2024simpo",
        "SimPO: Simple Preference Optimization with a Reference-Free Reward",
        "Yu Meng and Mengzhou Xia and Danqi Chen",
        2024,
        "2405.14734",
    ),
    "cpo": (
        "xu2024contrastive",
        "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in "
        "Machine Translation",
        "Haoran Xu and others",
        2024,
        "2401.08417",
    ),
}


def citation(loss_type: str) -> str | None:
    """BibTeX of the paper that a loss comes from; None for supervised fine-tuning."""
    if loss_type not in _PAPERS:
        return None
    key, title, author, year, number = _PAPERS[loss_type]
    lines = (
        f"@article{{{key},",
        f"    title   = {{{{{title}}}}},",
        f"    author  = {{{author}}},",
        f"    year    = {year},",
        f"    eprint  = {{arXiv:{number}}}",
        "}",
    )
    return "\n".join(lines)
