"""Every reader on small files made in the publisher's own form, read back as a manifest; and what is said when something lacks."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr_retrieval.cases.manifest import Manifest, read_manifest
from cxr_retrieval.cases.public_sets import READERS, Request, Uncertain, write_manifest
from cxr_retrieval.errors import ManifestError
from cxr_retrieval.radiograph.reading import read_radiograph
from cxr_retrieval_training.data.datasets import load_lung_masks
from tests_support import run_cxr


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 96), np.uint8)).save(path)


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def made(
    kind: str, root: Path, tmp_path: Path, uncertain: Uncertain = Uncertain.ignore, val_share: float = 0.0, findings: bool = False
) -> Manifest:
    out = tmp_path / "manifests" / f"{kind}.csv"
    write_manifest(kind, Request(root, out, uncertain, val_share, findings))
    manifest = read_manifest(out)
    for row in manifest.rows:
        assert read_radiograph(row.path).pixels.ndim == 2, "every path leads to a picture"
    return manifest


def covidx(root: Path) -> None:
    text(root / "train_COVIDx.txt", "3 a.png pneumonia cohen\n7 b.png normal rsna\n\n9 c.png COVID-19 fig1\n")
    text(root / "test_COVIDx.txt", "11 d.png positive\n")
    for name in ("train/a.png", "train/b.png", "train/c.png", "test/d.png"):
        picture(root / name)


def test_covidx(tmp_path: Path) -> None:
    covidx(tmp_path / "COVIDx")
    rows = made("covidx", tmp_path / "COVIDx", tmp_path).rows
    assert [(row.patient_id, row.label, row.split, row.source) for row in rows] == [
        ("3", "non_covid_pneumonia", "train", "covidx-cohen"),
        ("7", "control", "train", "covidx-rsna"),
        ("9", "covid19", "train", "covidx-fig1"),
        ("11", "covid19", "val", "covidx"),
    ]


def test_covidx_failures(tmp_path: Path) -> None:
    covidx(tmp_path)
    (tmp_path / "train" / "b.png").unlink()
    with pytest.raises(ManifestError, match=r"train_COVIDx.txt, line 2: names a file that is not there"):
        made("covidx", tmp_path, tmp_path)
    text(tmp_path / "train_COVIDx.txt", "3 a.png influenza cohen\n")
    with pytest.raises(ManifestError, match="line 1: not understood"):
        made("covidx", tmp_path, tmp_path)
    text(tmp_path / "train_COVIDx.txt", "11 a.png normal\n")
    with pytest.raises(ManifestError, match="patients in more than one split"):
        made("covidx", tmp_path, tmp_path)
    assert not (tmp_path / "manifests" / "covidx.csv").exists(), "nothing is written when anything is wrong"


IEEE = "patientid,offset,sex,age,finding,survival,pO2_saturation,leukocyte_count,view,modality,folder,filename,clinical_notes\n"


def test_ieee8023(tmp_path: Path) -> None:
    root = tmp_path / "covid-chestxray-dataset"
    lines = [
        "2,0,M,65,Pneumonia/Viral/COVID-19,Y,88,4.1,PA,X-ray,images,a.png,x",
        "2,3,M,65,Pneumonia/Viral/COVID-19,Y,,,AP Supine,X-ray,images,b.png,x",
        "4,0,F,30,Pneumonia/Bacterial/Streptococcus,,,,PA,X-ray,images,c.png,x",
        "5,0,F,31,No Finding,,,,PA,X-ray,images,d.png,x",
        "6,0,F,32,todo,,,,PA,X-ray,images,e.png,x",
        "7,0,F,33,Pneumonia/Viral/COVID-19,,,,L,X-ray,images,f.png,x",
        "8,0,F,34,Pneumonia/Viral/COVID-19,,,,Axial,CT,volumes,g.nii.gz,x",
    ]
    text(root / "metadata.csv", IEEE + "\n".join(lines) + "\n")
    for name in "abcd":
        picture(root / "images" / f"{name}.png")
    rows = made("ieee8023", root, tmp_path).rows
    assert [row.label for row in rows] == ["covid19", "covid19", "non_covid_pneumonia", "control"], "lateral, CT and todo are left out"
    assert (rows[0].patient_id, rows[0].fields["spo2"], rows[0].fields["wbc"], rows[0].fields["sex"]) == ("2", "88", "4.1", "M")
    assert "clinical_notes" not in rows[0].fields, "notes state the diagnosis"
    text(root / "metadata.csv", "patientid,view\n1,PA\n")
    with pytest.raises(ManifestError, match="column finding, modality, folder, filename missing"):
        made("ieee8023", root, tmp_path)


def test_folder_per_class(tmp_path: Path) -> None:
    root = tmp_path / "hospital"
    for name in ("train/control/1.png", "train/covid19/1.png", "test/covid19/deep/2.jpg"):
        picture(root / name)
    text(root / "train/control/notes.txt", "no picture")
    rows = made("folders", root, tmp_path).rows
    assert {(row.image_id, row.label, row.split) for row in rows} == {
        ("train-control-1", "control", "train"),
        ("train-covid19-1", "covid19", "train"),
        ("test-covid19-deep-2", "covid19", "val"),
    }
    flat = tmp_path / "flat"
    for i in range(40):
        picture(flat / ("control" if i % 2 else "covid19") / f"{i}.png")
    split = [row.split for row in made("folders", flat, tmp_path, val_share=0.3).rows]
    assert 2 < split.count("val") < 25
    assert split == [row.split for row in made("folders", flat, tmp_path, val_share=0.3).rows], "dealt alike every time"
    with pytest.raises(ManifestError, match="a folder per class"):
        made("folders", tmp_path / "nowhere", tmp_path)


CHEXPERT = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Pneumonia\n"


def test_chexpert_and_its_uncertain_labels(tmp_path: Path) -> None:
    root = tmp_path / "CheXpert-v1.0-small"
    path = "CheXpert-v1.0-small/train/patient{:05d}/study1/view1_{}.jpg"
    lines = [
        f"{path.format(1, 'frontal')},Female,68,Frontal,AP,1.0,",
        f"{path.format(2, 'frontal')},Male,55,Frontal,PA,,1.0",
        f"{path.format(3, 'frontal')},Male,54,Frontal,PA,,-1.0",
        f"{path.format(4, 'lateral')},Male,53,Lateral,,1.0,",
        f"{path.format(5, 'frontal')},Male,52,Frontal,AP,,0.0",
    ]
    text(root / "train.csv", CHEXPERT + "\n".join(lines) + "\n")
    for patient in (1, 2, 3, 5):
        picture(root / f"train/patient{patient:05d}/study1/view1_frontal.jpg")
    labels = {policy: [(row.patient_id, row.label) for row in made("chexpert", root, tmp_path, policy).rows] for policy in Uncertain}
    certain = [("patient00001", "control"), ("patient00002", "non_covid_pneumonia")]
    assert labels[Uncertain.ignore] == labels[Uncertain.negative] == certain
    assert labels[Uncertain.positive] == [*certain, ("patient00003", "non_covid_pneumonia")]
    text(root / "train.csv", CHEXPERT + "CheXpert-v1.0-small/train/x.jpg,Male,1,Frontal,AP,1.0,\n")
    with pytest.raises(ManifestError, match="line 2: not understood"):
        made("chexpert", root, tmp_path)
    text(root / "train.csv", CHEXPERT + f"{path.format(9, 'lateral')},Male,53,Lateral,,1.0,\n")
    with pytest.raises(ManifestError, match="no usable radiograph") as caught:
        made("chexpert", root, tmp_path)
    assert "--uncertain" in str(caught.value.next_step)


def test_all_findings_of_a_film_make_its_label(tmp_path: Path) -> None:
    """Of CheXpert's labeller: present ones, and uncertain ones where they count as such; a film of which nothing is stated is left out."""
    root = tmp_path / "CheXpert-v1.0-small"
    columns = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Lung Opacity,Edema,Pneumonia,Pleural Effusion,Support Devices\n"
    stated = ["1.0,,,,,", "1.0,,,,,1.0", ",1.0,-1.0,,1.0,0.0", ",,-1.0,,,", ",0.0,,,,"]
    name = "train/patient{:05d}/study1/view1_frontal.jpg"
    lines = [f"CheXpert-v1.0-small/{name.format(number)},Male,50,Frontal,AP,{cells}" for number, cells in enumerate(stated)]
    text(root / "train.csv", columns + "\n".join(lines) + "\n")
    for number in range(len(stated)):
        picture(root / name.format(number))
    certain = [row.label for row in made("chexpert", root, tmp_path, findings=True).rows]
    assert certain == ["no_finding", "support_devices", "lung_opacity|pleural_effusion"]
    uncertain = [row.label for row in made("chexpert", root, tmp_path, Uncertain.positive, findings=True).rows]
    assert uncertain == ["no_finding", "support_devices", "edema|lung_opacity|pleural_effusion", "edema"]
    for how in (Uncertain.ignore, Uncertain.positive):  # training learns nothing from these, whatever they count as in retrieval
        unsure = {row.label: row.fields.get("uncertain", "") for row in made("chexpert", root, tmp_path, how, findings=True).rows}
        assert {name for name, one in unsure.items() if one == "edema"} == {
            label for label in unsure if "opacity" in label or label == "edema"
        }
    assert "uncertain" not in made("chexpert", root, tmp_path, Uncertain.negative).rows[0].fields


def test_nih(tmp_path: Path) -> None:
    """Several findings in one cell, as they are published; the publisher's own test list; lateral films and other findings left out."""
    root = tmp_path / "CXR14"
    rows = [
        "00000001_000.png,Cardiomegaly|Emphysema,0,1,058Y,M,PA",
        "00000002_000.png,No Finding,0,2,81,F,AP",
        "00000003_000.png,Pneumonia|Pleural_Thickening,0,3,007Y,F,PA",
        "00000004_000.png,No Finding,0,4,40,F,LL",
    ]
    head = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position\n"
    text(root / "Data_Entry_2017_v2020.csv", head + "\n".join(rows) + "\n")
    text(root / "test_list.txt", "00000003_000.png\n")
    picture(root / "images_001" / "images" / "00000001_000.png")
    picture(root / "images_001" / "images" / "00000002_000.png")
    picture(root / "images_002" / "images" / "00000003_000.png")
    found = made("nih", root, tmp_path, findings=True).rows
    assert [(row.image_id, row.label, row.split, row.fields["age"]) for row in found] == [
        ("nih-00000001_000", "cardiomegaly|emphysema", "train", "58"),
        ("nih-00000002_000", "no_finding", "train", "81"),
        ("nih-00000003_000", "pleural_thickening|pneumonia", "val", "7"),
    ]
    assert [row.label for row in made("nih", root, tmp_path).rows] == ["control", "non_covid_pneumonia"], "our classes"
    (root / "test_list.txt").unlink()
    assert {row.split for row in made("nih", root, tmp_path).rows} == {"train"}
    (root / "images_002" / "images" / "00000003_000.png").unlink()
    with pytest.raises(ManifestError, match="line 4: not understood"):
        made("nih", root, tmp_path)


def test_mimic_cxr_jpg(tmp_path: Path) -> None:
    root = tmp_path / "mimic-cxr-jpg"
    tables = {
        "chexpert": "subject_id,study_id,No Finding,Pneumonia\n10000032,50414267,1.0,\n10000764,57375967,,1.0\n10000935,50578979,,-1.0\n",
        "split": "dicom_id,study_id,subject_id,split\naa,50414267,10000032,train\nbb,57375967,10000764,validate\ncc,50578979,10000935,train\ndd,50414267,10000032,train\n",
        "metadata": "dicom_id,subject_id,study_id,ViewPosition\naa,10000032,50414267,PA\nbb,10000764,57375967,AP\ncc,10000935,50578979,AP\ndd,10000032,50414267,LATERAL\n",
    }
    root.mkdir()
    for name, content in tables.items():
        (root / f"mimic-cxr-2.0.0-{name}.csv.gz").write_bytes(gzip.compress(content.encode()))
    picture(root / "files/p10/p10000032/s50414267/aa.jpg")
    picture(root / "files/p10/p10000764/s57375967/bb.jpg")
    rows = made("mimic-cxr-jpg", root, tmp_path).rows
    assert [(row.image_id, row.patient_id, row.label, row.split) for row in rows] == [
        ("mimic-aa", "10000032", "control", "train"),
        ("mimic-bb", "10000764", "non_covid_pneumonia", "val"),
    ]
    (root / "mimic-cxr-2.0.0-split.csv.gz").unlink()
    with pytest.raises(ManifestError, match=r"\*-split.csv\* missing"):
        made("mimic-cxr-jpg", root, tmp_path)


def test_montgomery_joins_both_lungs(tmp_path: Path) -> None:
    root = tmp_path / "MontgomerySet"
    for name in ("MCUCXR_0001_0", "MCUCXR_0108_1"):
        picture(root / "CXR_png" / f"{name}.png")
        for side, columns in (("left", slice(0, 32)), ("right", slice(64, 96))):
            mask = np.zeros((128, 96), np.uint8)
            mask[16:112, columns] = 255
            (root / "ManualMask" / f"{side}Mask").mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(root / "ManualMask" / f"{side}Mask" / f"{name}.png")
        text(root / "ClinicalReadings" / f"{name}.txt", "Patient's Sex: F\nPatient's Age: 027Y\nnormal\n")
    manifest = made("montgomery", root, tmp_path)
    assert [(row.label, row.split, row.fields["sex"], row.fields["age"]) for row in manifest.rows] == [
        ("control", "train", "F", "27"),
        ("tuberculosis", "extra", "F", "27"),
    ]
    masks = load_lung_masks(manifest.rows)
    assert (masks[0, 0, 128, 50], masks[0, 0, 128, 200], masks[0, 0, 128, 128]) == (255, 255, 0)
    (root / "ManualMask" / "leftMask" / "MCUCXR_0001_0.png").unlink()
    with pytest.raises(ManifestError, match=r"MCUCXR_0001_0.png missing"):
        made("montgomery", root, tmp_path)


def test_shenzhen_with_and_without_mask(tmp_path: Path) -> None:
    root = tmp_path / "ChinaSet"
    for name in ("CHNCXR_0001_0", "CHNCXR_0330_1"):
        picture(root / "CXR_png" / f"{name}.png")
        text(root / "ClinicalReadings" / f"{name}.txt", "female 45yrs\nnormal")
    picture(root / "mask" / "CHNCXR_0001_0_mask.png")
    rows = made("shenzhen", root, tmp_path).rows
    assert [(row.label, "lung_mask_path" in row.fields, row.fields["sex"], row.fields["age"]) for row in rows] == [
        ("control", True, "F", "45"),
        ("tuberculosis", False, "F", "45"),
    ]
    picture(root / "CXR_png" / "CHNCXR_0002_7.png")
    with pytest.raises(ManifestError, match="neither _0 nor _1"):
        made("shenzhen", root, tmp_path)


def test_jsrt_low_values_are_white(tmp_path: Path) -> None:
    root = tmp_path / "JSRT"
    root.mkdir()
    film = np.full((2048, 2048), 4095, ">u2")
    film[:1024] = np.arange(2048) // 8
    film.tofile(root / "JPCNN001.IMG")
    film.tofile(root / "JPCLN001.IMG")
    for side in ("left", "right"):
        folder = root / "fold2" / "masks" / f"{side} lung"
        folder.mkdir(parents=True)
        Image.fromarray(np.full((1024, 1024), 255, np.uint8)).save(folder / "JPCNN001.gif")
    manifest = made("jsrt", root, tmp_path)
    rows = {row.image_id: row for row in manifest.rows}
    assert (rows["jsrt-JPCNN001"].label, rows["jsrt-JPCNN001"].split) == ("control", "train")
    assert (rows["jsrt-JPCLN001"].label, rows["jsrt-JPCLN001"].split) == ("nodule", "extra")
    pixels = read_radiograph(rows["jsrt-JPCNN001"].path).pixels
    assert (pixels[100, 0], pixels[2000, 100]) == (255, 0)
    assert rows["jsrt-JPCNN001"].fields["mask_source"] == "scr"
    (root / "JPCNN001.IMG").write_bytes(b"short")
    with pytest.raises(ManifestError, match="not a JSRT film"):
        made("jsrt", root, tmp_path)


@pytest.mark.parametrize("kind", READERS)
def test_an_empty_folder_is_explained(kind: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError) as caught:
        made(kind, tmp_path / "empty", tmp_path)
    assert caught.value.expected
    assert caught.value.next_step


def test_the_command_counts_and_explains(tmp_path: Path) -> None:
    for name in ("control/1.png", "covid19/1.png", "covid19/2.png"):
        picture(tmp_path / "hospital" / name)
    arguments = ("manifest", "folders", tmp_path / "hospital", "--out", tmp_path / "m.csv", "--val-share", "0")
    done = run_cxr(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "m.csv")
    assert "2  train/covid19" in done.stderr
    refused = run_cxr(*arguments, "--uncertain", "perhaps")
    assert refused.returncode == 2
    assert "'perhaps' is not one of" in refused.stderr
    single = run_cxr(*arguments, "--findings")
    assert single.returncode == 2
    assert "--findings with folders" in single.stderr
    missing = run_cxr("manifest", "chexpert", tmp_path / "hospital", "--out", tmp_path / "n.csv")
    assert missing.returncode == 2
    assert "train.csv or valid.csv of the CheXpert release" in missing.stderr
