"Published collections in their publishers' layouts: every packing gives the same dataset, a fault leaves nothing."
import hashlib
import http.server
import io
import shutil
import tarfile
import threading
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from skinlesion.data import downloads
from skinlesion.data.schema import read_dataset
from skinlesion.data.collections import download_source
from skinlesion.data.published import COLLECTIONS, SOURCES
from skinlesion.data.downloads import DownloadError, RemoteFile, fetch_file
from skinlesion.data.isic import import_isic
from skinlesion.files import repo_root
from skinlesion.pipeline.cli import app

REAL = repo_root(Path(__file__).parent).parent / "shared" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason="no real data in ../shared/data")


def picture(seed, size=(20, 16)):
    "A small JPEG of noise."
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(
        out, "JPEG"
    )
    return out.getvalue()


def grey():
    "A mask that is white all over."
    out = io.BytesIO()
    Image.new("L", (20, 16), 255).save(out, "BMP")
    return out.getvalue()


def csv(head, *rows):
    return "\n".join([head, *rows, ""]).encode()


def one_hot(columns, classes, image="image"):
    "A ground truth of the ISIC challenges: id -> class."
    names = columns.split()
    return csv(
        f"{image},{','.join(names)}",
        *(f"{i},{','.join('1.0' if n == c else '0.0' for n in names)}" for i, c in classes.items()),
    )


SEVEN = "MEL NV BCC AKIEC BKL DF VASC"
NINE = "MEL NV BCC AK BKL DF VASC SCC UNK"
HAM = {
    "HAM10000_metadata.csv": csv(
        "lesion_id,image_id,dx,dx_type,age,sex,localization",
        "HAM_1,I_1,nv,follow_up,50,male,back",
        "HAM_1,I_2,nv,follow_up,50,male,back",
        "HAM_2,I_3,mel,histo,0.0,unknown,unknown",
    ),
    "HAM10000_images_part_1.zip/I_1.jpg": picture(1),
    "HAM10000_images_part_1.zip/I_2.jpg": picture(2),
    "HAM10000_images_part_2.zip/I_3.jpg": picture(3),
}
TRUTH2018 = "ISIC2018_Task3_Training_GroundTruth"
ISIC2018 = {
    f"{TRUTH2018}.zip/{TRUTH2018}/{TRUTH2018}.csv": one_hot(
        SEVEN, dict(I_1="NV", I_2="MEL", I_3="MEL")
    ),
    "ISIC2018_Task3_Validation_GroundTruth.zip/ISIC2018_Task3_Validation_GroundTruth.csv": one_hot(
        SEVEN, dict(I_4="AKIEC")
    ),
    "ISIC2018_Task3_Test_GroundTruth.zip/ISIC2018_Task3_Test_GroundTruth.csv": one_hot(SEVEN, dict(I_5="NV")),
    "ISIC2018_Task3_Training_LesionGroupings.csv": csv(
        "image,lesion_id,diagnosis_confirm_type",
        "I_3,HAM_2,histopathology",
        "I_2,HAM_2,histopathology",
        "I_1,HAM_1,serial imaging showing no change",
    ),
    "ISIC2018_Task3_Training_Input.zip/ISIC2018_Task3_Training_Input/LICENSE.txt": b"CC BY-NC",
    **{f"ISIC2018_Task3_Training_Input.zip/ISIC2018_Task3_Training_Input/I_{i}.jpg": picture(i) for i in (1, 2, 3)},
    "ISIC2018_Task3_Validation_Input.zip/I_4.jpg": picture(4),
    "ISIC2018_Task3_Test_Input.zip/I_5.jpg": picture(5),
}
ISIC2019 = {
    "ISIC_2019_Training_GroundTruth.csv": one_hot(NINE, dict(I_1="NV", I_2_downsampled="SCC", I_3="AK")),
    "ISIC_2019_Training_Metadata.csv": csv(
        "image,age_approx,anatom_site_general,lesion_id,sex",
        "I_1,0.0,anterior torso,HAM_1,female",
        "I_2_downsampled,0.0,head/neck,BCN_7,male",
        "I_3,,,,",
    ),
    "ISIC_2019_Test_GroundTruth.csv": one_hot(NINE, dict(I_9="UNK")),
    "ISIC_2019_Test_Metadata.csv": csv("image,age_approx,anatom_site_general,sex", "I_9,40.0,palms/soles,male"),
    "ISIC_2019_Training_Input.zip/ISIC_2019_Training_Input/I_1.jpg": picture(1),
    "ISIC_2019_Training_Input.zip/ISIC_2019_Training_Input/I_2_downsampled.jpg": picture(2),
    "ISIC_2019_Training_Input.zip/ISIC_2019_Training_Input/I_3.jpg": picture(3),
    "ISIC_2019_Test_Input.zip/I_9.jpg": picture(9),
}
HEAD2020 = (
    "image_name,patient_id,lesion_id,sex,age_approx,anatom_site_general_challenge,diagnosis,benign_malignant,target"
)
ROWS2020 = (
    "I_1,IP_1,IL_1,male,60.0,upper extremity,unknown,benign,0",
    "I_2,IP_1,IL_2,male,60.0,torso,melanoma,malignant,1",
    "I_3,IP_2,IL_3,,0.0,oral/genital,nevus,benign,0",
)
ISIC2020 = {
    "ISIC_2020_Training_GroundTruth_v2.csv": csv(HEAD2020, *ROWS2020),
    "ISIC_2020_Training_GroundTruth.csv": csv(
        HEAD2020.replace("lesion_id,", ""), *(r.replace(f"IL_{r[2]},", "") for r in ROWS2020)
    ),
    "ISIC_2020_Training_Duplicates.csv": csv("image_name_1,image_name_2", "I_3,I_1", "I_8,I_2"),
    **{f"ISIC_2020_Training_JPEG.zip/train/I_{i}.jpg": picture(i) for i in (1, 2, 3)},
}
# As isic-cli 12.7 writes it: three columns, then in alphabetical order those fields that some image has.
NEVUS = "Benign,Benign melanocytic proliferations,Nevus"
MELANOMA = "Malignant,Malignant melanocytic proliferations (Melanoma),Melanoma in situ"
ISIC = {
    "metadata.csv": csv(
        "isic_id,attribution,copyright_license,age_approx,anatom_site_1,anatom_site_2,anatom_site_general,"
        "concomitant_biopsy,diagnosis_1,diagnosis_2,diagnosis_3,diagnosis_confirm_type,image_type,lesion_id,"
        "melanocytic,patient_id,sex",
        f"ISIC_1,Clinic A,CC-0,45,Lower extremity,Foot,lower extremity,True,{NEVUS},histopathology,dermoscopic,IL_1,"
        "True,IP_1,female",
        f"ISIC_2,Clinic A,CC-BY-NC,85+,,,anterior torso,,{MELANOMA},,dermoscopic,IL_2,True,IP_2,male",
        f"ISIC_3,Anonymous,CC-0,,,,,,{NEVUS},,dermoscopic,IL_3,True,IP_2,",
        f"ISIC_4,Anonymous,CC-0,,,,,,{NEVUS},,clinical: overview,IL_3,True,IP_2,",
    ),
    **{f"ISIC_{i}.jpg": picture(i) for i in (1, 2, 3, 4)},
    "attribution.txt": b"Clinic A\n\nAnonymous",
    "licenses/CC-0.txt": b"No rights reserved.",
}
LAYOUTS = dict(ham10000=HAM, isic2018=ISIC2018, isic2019=ISIC2019, isic2020=ISIC2020, isic=ISIC)
IMPORTERS = SOURCES | dict(isic=import_isic)
PH2 = {
    "PH2Dataset/PH2_dataset.txt": b"""
|| Name   || Histological Diagnosis || Clinical Diagnosis || Asymmetry | Pigment Network || Colors ||
|| IMD003 ||                        ||                  0 ||         0 |               T ||     4  ||
|| IMD006 ||                        ||                  1 ||         0 |              AT ||     4  ||
|| IMD058 ||               Melanoma ||                  2 ||         2 |              AT ||  3  4  ||

Clinical Diagnosis: 0 - Common Nevus; 1 - Atypical Nevus; 2 - Melanoma.
""".strip(b"\n"),
    **{f"PH2Dataset/PH2 Dataset images/IMD{i}/IMD{i}_Dermoscopic_Image/IMD{i}.bmp": picture(int(i)) for i in
       ("003", "006", "058")},
    "PH2Dataset/PH2 Dataset images/IMD058/IMD058_lesion/IMD058_lesion.bmp": grey(),
    "PH2Dataset/PH2 Dataset images/IMD058/IMD058_roi/IMD058_R1_Label4.bmp": grey(),
    "PH2Dataset/PH2_dataset.xlsx": b"PK",
}
DERM7PT = {
    "release_v0/meta/meta.csv": csv(
        "case_num,diagnosis,seven_point_score,pigment_network,level_of_diagnostic_difficulty,location,sex,clinic,derm,"
        "case_id,notes",
        "1,clark nevus,0,absent,low,lower limbs,female,NEL/Nel025.jpg,NEL/Nel026.jpg,,",
        "2,melanoma (less than 0.76 mm),4,atypical,high,head neck,male,Fel/Fel053.jpg,Fel/FEL051.JPG,,",
        "3,miscellaneous,1,absent,low,genital areas,male,Aal/Aal001.jpg,Aal/Aal002.jpg,,",
    ),
    **{f"release_v0/meta/{part}_indexes.csv": csv("indexes", str(k)) for k, part in
       enumerate(("train", "valid", "test"))},
    **{f"release_v0/images/{name}": picture(k) for k, name in enumerate(
        ("NEL/Nel025.jpg", "NEL/Nel026.jpg", "Fel/Fel053.jpg", "Fel/Fel051.jpg", "Aal/Aal001.jpg", "Aal/Aal002.jpg"))},
}
PAD = {
    "metadata.csv": csv(
        "patient_id,lesion_id,smoke,drink,age,gender,fitspatrick,region,diagnostic,itch,img_id,biopsed",
        "PAT_1516,1765,,,8,,,ARM,NEV,FALSE,PAT_1516_1765_530.png,False",
        "PAT_46,881,False,False,55,FEMALE,3.0,NECK,BCC,True,PAT_46_881_939.png,True",
        "PAT_46,881,False,False,55,FEMALE,3.0,NECK,BCC,True,PAT_46_881_14.png,True",
        "PAT_9,15,False,False,77,MALE,2.0,FACE,ACK,True,PAT_9_15_1.png,False",
    ),
    **{f"images/imgs_part_{k % 3 + 1}.zip/imgs_part_{k % 3 + 1}/{n}.png": picture(k) for k, n in enumerate(
        ("PAT_1516_1765_530", "PAT_46_881_939", "PAT_46_881_14", "PAT_9_15_1"))},
}
BCN = {
    "bcn_20k_train.csv": csv(
        "bcn_filename,age_approx,anatom_site_general,diagnosis,lesion_id,capture_date,sex,split",
        "BCN_0000000001.jpg,55.0,anterior torso,MEL,BCN_0003884,2012-05-16,male,train",
        "BCN_0000000003.jpg,50.0,anterior torso,MEL,BCN_0003884,2015-07-09,female,train",
        "BCN_0000000004.jpg,85.0,head/neck,SCC,BCN_0002287,2015-11-23,male,train",
        "BCN_0000000006.jpg,,,NV,BCN_0006584,2015-05-12,,train",
    ),
    "bcn_20k_test.csv": csv("bcn_filename,age_approx,anatom_site_general,lesion_id,sex,split", "BCN_9.jpg,5,,L,,test"),
    **{f"BCN_20k_train.zip/bcn_20k_train/BCN_000000000{k}.jpg": picture(k) for k in (1, 3, 4, 6)},
}
FITZPATRICK = {
    "fitzpatrick17k.csv": csv(
        "md5hash,fitzpatrick_scale,fitzpatrick_centaur,label,nine_partition_label,three_partition_label,qc,url,url_alphanum",
        "5e82a45bc5d78bd24ae9202d194423f8,3,3,drug induced pigmentary "
        "changes,inflammatory,non-neoplastic,,http://x/1,x1.jpg",
        "fa2911a9b13b6f8af79cb700937cc14f,-1,1,photodermatoses,inflammatory,non-neoplastic,,http://x/2,x2.jpg",
        "d2bac3c9e4499032ca8e9b07c7d3bc40,2,3,superficial spreading melanoma ssm,malignant "
        "melanoma,malignant,,http://x/3,x3",
    ),
    **{
        f"photos/{n}.jpg": picture(k)
        for k, n in enumerate(
            ("5e82a45bc5d78bd24ae9202d194423f8", "fa2911a9b13b6f8af79cb700937cc14f", "d2bac3c9e4499032ca8e9b07c7d3bc40")
        )
    },
}
DDI = {
    "ddidiversedermatologyimages/ddi_metadata.csv": csv(
        ",DDI_ID,DDI_file,skin_tone,malignant,disease",
        "0,1,000001.png,56,True,melanoma-in-situ",
        "1,2,000002.png,56,True,melanoma-in-situ",
        "2,3,000003.png,12,False,mycosis-fungoides",
    ),
    **{f"ddidiversedermatologyimages/00000{k}.png": picture(k) for k in (1, 2, 3)},
}
SCIN = {
    "dataset/scin_cases.csv": csv(
        "case_id,source,release,year,age_group,sex_at_birth,fitzpatrick_skin_type,image_1_path,image_2_path,image_3_path",
        "-1,SCIN,1.0.0,2023,AGE_30_TO_39,FEMALE,FST2,dataset/images/-11.png,dataset/images/-12.png,",
        "-2,SCIN,1.0.0,2023,AGE_UNKNOWN,OTHER_OR_UNSPECIFIED,,dataset/images/-21.png,,",
        "-3,SCIN,1.0.0,2023,AGE_UNKNOWN,MALE,,dataset/images/-31.png,,",
        "-4,SCIN,1.0.0,2023,AGE_UNKNOWN,MALE,,dataset/images/-41.png,,",
    ),
    "dataset/scin_labels.csv": csv(
        "case_id,dermatologist_skin_condition_on_label_name,weighted_skin_condition_label",
        "-1,\"['Eczema', 'Psoriasis']\",\"{'Eczema': 0.6, 'Psoriasis': 0.4}\"",
        "-2,\"['Inflicted skin lesions']\",{'Inflicted skin lesions': 1.0}",
        "-3,[],{}",
        "-4,\"['Acne', 'Tinea']\",\"{'Acne': 0.5, 'Tinea': 0.5}\"",
    ),
    **{f"dataset/images/-{k}.png": picture(k) for k in (11, 12, 21, 31, 41)},
}
MILK = {
    "MILK10k_Training_GroundTruth.csv": one_hot(
        "AKIEC BCC BEN_OTH BKL DF INF MAL_OTH MEL NV SCCKA VASC", dict(IL_1="BCC", IL_2="INF", IL_3="NV"), "lesion_id"
    ),
    "MILK10k_Training_Metadata.csv": csv(
        "lesion_id,image_type,isic_id,attribution,copyright_license,age_approx,sex,skin_tone_class,site,MONET_hair",
        "IL_1,clinical: close-up,ISIC_1,MILK,CC-BY-NC,60.0,male,3,head_neck_face,0.1",
        "IL_1,dermoscopic,ISIC_2,MILK,CC-BY-NC,60.0,male,3,head_neck_face,0.1",
        "IL_2,dermoscopic,ISIC_3,MILK,CC-BY-NC,,female,,trunk,0.1",
        "IL_2,clinical: close-up,ISIC_4,MILK,CC-BY-NC,,female,,trunk,0.1",
        "IL_3,dermoscopic,ISIC_5,MILK,CC-BY-NC,40,female,2,lower_extremity,0.1",
        "IL_3,clinical: close-up,ISIC_6,MILK,CC-BY-NC,40,female,2,lower_extremity,0.1",
    ),
    "MILK10k_Test_Metadata.csv": csv(
        "lesion_id,image_type,isic_id,age_approx,sex,site", "IL_9,dermoscopic,ISIC_9,1,male,"
    ),
    **{
        f"MILK10k_Training_Input.zip/MILK10k_Training_Input/IL_{(k + 1) // 2}/ISIC_{k}.jpg": picture(k)
        for k in range(1, 7)
    },
}
DESCRIBED = dict(
    ph2=PH2, derm7pt=DERM7PT, padufes20=PAD, bcn20000=BCN, fitzpatrick17k=FITZPATRICK, ddi=DDI, scin=SCIN, milk10k=MILK
)


def in_zip(files):
    "The bytes of a zip archive."
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in files.items():
            z.writestr(name, data)
    return out.getvalue()


def in_tar(files, mode="w"):
    "The bytes of a tar archive."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as t:
        for name, data in files.items():
            e = tarfile.TarInfo(name)
            e.size = len(data)
            t.addfile(e, io.BytesIO(data))
    return out.getvalue()


def packed(files, pack):
    "The layout with its archives made: each `X.zip/...` goes into one."
    out = {}
    inside = {}
    for name, data in files.items():
        outer, slash, rest = name.partition(".zip/")
        if slash:
            inside.setdefault(outer, {})[rest] = data
        else:
            out[name] = data
    return out | {f"{name}{'.zip' if pack is in_zip else '.tar'}": pack(held) for name, held in inside.items()}


PACKINGS = dict(
    published=lambda files: packed(files, in_zip),
    unpacked=lambda files: {n.replace(".zip/", "/"): d for n, d in files.items()},
    flat=lambda files: {n.split("/")[-1]: d for n, d in files.items()},
    tars=lambda files: packed(files, in_tar),
    zip_of_zips=lambda files: {"all.zip": in_zip(packed(files, in_zip))},
    tgz_of_tars=lambda files: {"a.tgz": in_tar(packed(files, in_tar), "w:gz")},
    zip_of_files=lambda files: {"all.zip": in_zip(files)},
    tar_xz=lambda files: {"all.tar.xz": in_tar(files, "w:xz")},
    tar_bz2=lambda files: {"x/all.tar.bz2": in_tar(files, "w:bz2")},
    twice=lambda files: packed(files, in_zip) | {"b.tar": in_tar(files)},
)


def lay(folder, files):
    "Files on the disk."
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def sums(folder):
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    "Each collection imported as it is published, and its report."
    folder = tmp_path_factory.mktemp("expected")
    reports = {}
    for name, files in LAYOUTS.items():
        reports[name] = IMPORTERS[name](lay(folder / "in" / name, packed(files, in_zip)), folder / name)
    return folder, reports


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_any_packing_gives_the_same_bytes(expected, tmp_path, name, packing):
    files = PACKINGS[packing](LAYOUTS[name])
    IMPORTERS[name](lay(tmp_path / "in", files), tmp_path / "data")
    assert sums(tmp_path / "data") == sums(expected[0] / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "in"]  # no spooled file is left


def table_of(expected, name):
    "What was imported, by image."
    return read_dataset(expected[0] / name).table.set_index("image_id").fillna(-1)


def test_ham10000(expected):
    table = table_of(expected, "ham10000")
    report = expected[1]["ham10000"]
    assert table.diagnosis.to_dict() == dict(I_1="nv", I_2="nv", I_3="mel") and table.lesion_id["I_2"] == "HAM_1"
    assert table.age.tolist() == [50, 50, -1] and (report.age_zero, report.age_missing, report.site_missing) == (
        1,
        1,
        1,
    )
    assert (report.classes["nv"], report.lesions["nv"], report.n_patients, report.source) == (2, 1, 0, "HAM10000")
    assert "2 lesions in" in str(report) and "nv 2 (1)" in str(report)


def test_isic2018(expected):
    table = table_of(expected, "isic2018")
    report = expected[1]["isic2018"]
    assert table.split.to_dict() == dict(I_1="train", I_2="train", I_3="train", I_4="valid", I_5="test")
    assert table.diagnosis.tolist() == ["nv", "mel", "mel", "akiec", "nv"] and "MEL" not in table
    assert (
        table.lesion_id.tolist() == ["HAM_1", "HAM_2", "HAM_2", "I_4", "I_5"]
        and table.diagnosis_confirm_type["I_2"] == "histopathology"
    )
    assert report.classes == dict(akiec=1, bcc=0, bkl=0, df=0, mel=2, nv=2, vasc=0) and report.other_files[0].endswith(
        "LICENSE.txt"
    )


def test_isic2019(expected):
    table = table_of(expected, "isic2019")
    report = expected[1]["isic2019"]
    assert table.diagnosis.tolist() == ["nv", "scc", "ak", "unk"] and table.split.tolist() == ["train"] * 3 + ["test"]
    assert table.age.tolist() == [-1, 0, -1, 40] and (report.age_zero, report.age_missing) == (
        1,
        2,
    )  # 0 is missing in HAM10000's images only
    assert table.site.tolist() == ["trunk", "head/neck", "", "acral"] and table.lesion_id.tolist() == [
        "HAM_1",
        "BCN_7",
        "I_3",
        "I_9",
    ]


def test_isic(expected):
    "Other types of images are left out and counted, licences are counted, the archive's words become ours."
    table = table_of(expected, "isic")
    report = expected[1]["isic"]
    assert table.diagnosis.to_dict() == dict(ISIC_1="nv", ISIC_2="mel", ISIC_3="nv")
    assert table.site.tolist() == ["foot", "trunk", ""] and table.age.tolist() == [45, 85, -1]
    assert table.lesion_id.tolist() == ["IL_1", "IL_2", "IL_3"] and table.patient_id["ISIC_3"] == "IP_2"
    assert table.diagnosis_confirm_type["ISIC_1"] == "histopathology" and table.concomitant_biopsy["ISIC_1"] == "True"
    assert table.copyright_license.tolist() == ["CC-0", "CC-BY-NC", "CC-0"]
    assert report.licence == "CC-0 (2 images), CC-BY-NC (1 image)"
    assert "1 images left out, not dermoscopic: clinical: overview (1); --image-type all keeps them" in report.notes
    assert (report.images_without_row, report.other_files) == ((), ())


def test_isic_options_reach_the_import(tmp_path):
    "All types of images, another label set, an image without a diagnosis, a class for one that has none, a name."
    files = changed(ISIC, metadata=(f"ISIC_3,Anonymous,CC-0,,,,,,{NEVUS}", "ISIC_3,Anonymous,CC-0,,,,,,,,"))
    files = changed(files, metadata=("Melanoma in situ", "Melanoma metastasis"))
    words = ["--image-type", "all", "--label-set", "melanoma", "--unlabelled", "--map", "Melanoma metastasis=mel"]
    source = lay(tmp_path / "in", files)
    command = ["import", "isic", str(source), *words, "--name", "mine", "--out", str(tmp_path / "data")]
    ended = CliRunner().invoke(app, command)
    assert ended.exit_code == 0, ended.output
    assert "1 images kept without a diagnosis, of no class of melanoma: none stated (1)" in ended.output
    data = read_dataset(tmp_path / "data")
    assert data.info.name == "mine" and data.table.diagnosis.tolist() == ["benign", "mel", "", "benign"]


def test_isic2020(expected):
    table = table_of(expected, "isic2020")
    report = expected[1]["isic2020"]
    assert table.diagnosis.tolist() == ["benign", "mel", "benign"] and table.diagnosis_fine.tolist() == [
        "unknown",
        "melanoma",
        "nevus",
    ]
    assert table.patient_id.tolist() == ["IP_1", "IP_1", "IP_2"] and table.lesion_id.tolist() == [
        "IL_1",
        "IL_2",
        "IL_3",
    ]
    assert table.age["I_3"] == 0 and (report.n_patients, report.age_zero) == (2, 0)
    assert table.duplicate_of.tolist() == ["", "", "I_1"] and report.duplicates == ("I_3",)
    assert report.notes[0] == "isic2020/ISIC_2020_Training_Duplicates.csv: 1 of 2 pairs name an image that has no row"
    assert report.other_files == ("isic2020/ISIC_2020_Training_GroundTruth.csv",)  # the older edition has no lesions


def test_isic2020_without_lesions_and_list(tmp_path):
    files = {n: d for n, d in ISIC2020.items() if "v2" not in n and "Duplicates" not in n}
    report = SOURCES["isic2020"](lay(tmp_path / "in", files), tmp_path / "data")
    assert (report.n_lesions, report.n_patients, report.duplicates) == (
        3,
        2,
        (),
    ) and "there is no column duplicate_of" in str(report)
    assert "duplicate_of" not in read_dataset(tmp_path / "data").table


def test_part_of_isic2018_without_groupings(tmp_path):
    files = {n: d for n, d in ISIC2018.items() if "Training" in n and "Groupings" not in n}
    report = SOURCES["isic2018"](lay(tmp_path / "in", files), tmp_path / "data")
    assert report.n_lesions == 3 and "counts as a lesion of its own" in report.notes[0]
    assert read_dataset(tmp_path / "data").table.split.unique().tolist() == ["train"]


def test_names_that_differ_in_form_only(tmp_path):
    "Ids with a suffix in the table, another case and suffix on the disk; a mask in another case."
    files = changed(HAM, metadata=("I_1,", "i_1.JPG,"))
    files = {n.replace("I_2.jpg", "I_2.JPEG"): d for n, d in files.items()}
    out = io.BytesIO()
    Image.new("L", (20, 16), 255).save(out, "PNG")
    files["masks/i_3_Segmentation.PNG"] = out.getvalue()
    report = SOURCES["ham10000"](lay(tmp_path / "in", files), tmp_path / "data")
    assert (report.n_images, report.n_masks, report.images_without_row) == (3, 1, ())
    assert read_dataset(tmp_path / "data").table.image_id.tolist() == ["i_1", "I_2", "I_3"]
    assert report.notes[-1] == (
        "1 images are called otherwise in the table: 'i_1.JPG' is in/HAM10000_images_part_1.zip/I_1.jpg"
    )


WANTED = dict(
    ph2=(dict(IMD003="common_nevus", IMD006="atypical_nevus", IMD058="mel"), ["mel"], []),
    derm7pt=(
        dict(Nel026="nv", FEL051="mel", Aal002="misc"), ["bcc", "mel"],
        ["left out: 3 images of type 'clinical: close-up'; --image-type all keeps them"],
    ),
    padufes20=(
        dict(PAT_1516_1765_530="nv", PAT_46_881_939="bcc", PAT_46_881_14="bcc", PAT_9_15_1="ak"), ["bcc", "mel", "scc"],
        ["clinical photographs, not dermatoscopic images"],
    ),
    bcn20000=(
        dict(BCN_0000000001="mel", BCN_0000000003="mel", BCN_0000000004="scc", BCN_0000000006="nv"),
        ["ak", "bcc", "mel", "scc"], [],
    ),
    fitzpatrick17k=(
        {"5e82a45bc5d78bd24ae9202d194423f8": "inflammatory", "fa2911a9b13b6f8af79cb700937cc14f": "inflammatory",
         "d2bac3c9e4499032ca8e9b07c7d3bc40": "malignant_melanoma"},
        ["malignant_cutaneous_lymphoma", "malignant_dermal", "malignant_epidermal", "malignant_melanoma"],
        ["clinical photographs", "the collection holds duplicates and wrong labels"],
    ),
    ddi=({"000001": "malignant", "000002": "malignant", "000003": "benign"}, ["malignant"], ["clinical photographs"]),
    scin=(
        {"-11": "eczema", "-12": "eczema", "-21": "inflicted_skin_lesions"}, None,
        ["clinical photographs", "left out: 2 images without a diagnosis; no dermatologist named a condition, or two"],
    ),
    milk10k=(
        dict(ISIC_2="bcc", ISIC_3="inf", ISIC_5="nv"), ["akiec", "bcc", "mal_oth", "mel", "sccka"],
        ["left out: 3 images of type 'clinical: close-up'; --image-type all keeps them"],
    ),
)


@pytest.mark.parametrize("name", DESCRIBED)
@pytest.mark.parametrize("packing", ["published", "zip_of_zips"])
def test_a_collection_by_description(tmp_path, name, packing):
    diagnoses, malignant, notes = WANTED[name]
    report = SOURCES[name](lay(tmp_path / "in", PACKINGS[packing](DESCRIBED[name])), tmp_path / "data")
    data = read_dataset(tmp_path / "data")
    assert data.table.set_index("image_id").diagnosis.to_dict() == diagnoses
    assert data.label_set.to_dict()["malignant"] == malignant
    for note in notes:
        assert any(n.startswith(note) for n in report.notes), report.notes
    assert data.info.licence and data.info.citation and data.info.source.startswith("https://")


def test_what_the_tables_of_the_described_tell(tmp_path):
    "Masks, splits, patients, lesions, sites and confirmations."
    def table(name, **options):
        SOURCES[name](lay(tmp_path / name / "in", DESCRIBED[name]), tmp_path / name / "out", **options)
        return read_dataset(tmp_path / name / "out")
    ph2 = table("ph2")
    assert ph2.mask_path("IMD058") and not ph2.mask_path("IMD003") and ph2.table.Colors.tolist() == ["4", "4", "3  4"]
    derm = table("derm7pt", image_type="all").table
    assert derm.lesion_id.tolist() == ["1", "1", "2", "2", "3", "3"] and derm.image_type.nunique() == 2
    assert derm.split.tolist() == ["train"] * 2 + ["valid"] * 2 + ["test"] * 2
    assert derm.site.tolist()[::2] == ["lower extremity", "head/neck", "genital"]
    pad = table("padufes20").table
    assert pad.patient_id.nunique() == 3 and pad.lesion_id.nunique() == 3 and pad.age.tolist() == [8, 55, 55, 77]
    assert pad.diagnosis_confirm_type.tolist() == ["clinical consensus"] + ["histopathology"] * 2 + [
        "clinical consensus"
    ]
    fitz = table("fitzpatrick17k").table
    assert fitz.fitzpatrick.tolist() == ["3", "", "2"] and fitz.diagnosis_fine[1] == "photodermatoses"
    assert set(table("ddi").table.diagnosis_confirm_type) == {"histopathology"}
    scin = table("scin").table
    assert scin.lesion_id.tolist() == ["-1", "-1", "-2"] and scin.sex.tolist() == ["female", "female", ""]
    milk = table("milk10k").table
    assert milk.site.tolist() == ["head/neck", "trunk", "lower extremity"] and milk.lesion_id[0] == "IL_1"
    seven = table("padufes20", label_set="ham10000").table
    assert seven.diagnosis.tolist() == ["nv", "bcc", "bcc", "akiec"]


def changed(files, **edits):
    "The layout with words replaced in the tables whose names hold a key, or files removed (None)."
    out = dict(files)
    for key, edit in edits.items():
        names = [n for n in files if key in n]
        assert names, key
        for n in names:
            if edit is None:
                del out[n]
            else:
                assert edit[0].encode() in out[n], edit
                out[n] = out[n].replace(*(e.encode() for e in edit))
    return out


BAD = [
    (
        "isic2018",
        dict(Training_GroundTruth=("I_1,0.0,1.0", "I_1,1.0,1.0")),
        "Training_GroundTruth.csv row 2: MEL and NV are 1; exactly one of",
    ),
    (
        "isic2018",
        dict(Training_GroundTruth=("I_1,0.0,1.0", "I_1,0.0,0.0")),
        "Training_GroundTruth.csv row 2: no class is 1; exactly one",
    ),
    ("isic2018", dict(Training_GroundTruth=("I_1,0.0,1.0", "I_1,0.0,0.9")), "row 2: NV is '0.9'; allowed are 0 and 1"),
    ("isic2018", dict(Training_GroundTruth=("I_1,0.0,1.0", "I_1,,1.0")), "row 2: MEL is ''; allowed are 0 and 1"),
    (
        "isic2018",
        dict(Validation_GroundTruth=("I_4", "I_1")),
        "Validation_GroundTruth.csv row 2: image_id 'I_1' is already in ",
    ),
    (
        "isic2018",
        dict(Groupings=("I_1,", "I_7,")),
        "Training_GroundTruth.csv row 2: image 'I_1' has no row in in/ISIC2018_",
    ),
    ("isic2018", dict(Groupings=("I_1,", "I_7,")), "LesionGroupings.csv row 4: image 'I_7' has no row in "),
    (
        "isic2018",
        dict(Groupings=("I_1,", "I_2,")),
        "LesionGroupings.csv row 4: image 'I_2' is already in row 3; keep one",
    ),
    (
        "isic2018",
        {"Training_Input/I_2": None},
        "Training_GroundTruth.csv row 3: there is no image 'I_2' in what was given",
    ),
    (
        "isic2018",
        dict(GroundTruth=None),
        "no ground truth (a table with the columns image, MEL, NV, BCC, AKIEC, BKL, DF and VASC, such as",
    ),
    (
        "isic2019",
        dict(Training_Metadata=None),
        "no table of details for in/ISIC_2019_Training_GroundTruth.csv (a table with the columns age_approx",
    ),
    (
        "isic2019",
        dict(Test_Metadata=("I_9", "I_8")),
        "ISIC_2019_Test_GroundTruth.csv row 2: image 'I_9' has no row in in/ISIC_2019_Test_M",
    ),
    (
        "isic2019",
        dict(Training_Metadata=("anterior torso", "anterior trso")),
        "row 2: site 'anterior trso' is not known",
    ),
    ("isic2019", dict(Training_Metadata=("anterior torso", "anterior trso")), "--map 'anterior trso="),
    (
        "isic2019",
        dict(Training_Metadata=(",female", ",femal")),
        "sex 'femal' is not known; allowed are female, male, or empty for unknown.",
    ),
    ("isic2019", dict(Training_Metadata=("0.0,head", "850,head")), "row 3: age '850' is not a number of years"),
    ("isic2019", dict(Training_GroundTruth=("SCC,UNK", "SCC,UNC")), "ISIC_2019_Test"),
    (
        "isic2020",
        dict(GroundTruth_v2=(",malignant", ",malignnt")),
        "row 3: diagnosis 'malignnt' is not in label set melanoma (benign, mel)",
    ),
    (
        "isic2020",
        dict(GroundTruth_v2=("malignant,1", "malignant,0")),
        "row 3: target is '0' where the diagnosis is 'malignant'; it must be 1",
    ),
    (
        "isic2020",
        dict(GroundTruth_v2=("patient_id", "patient")),
        "row 1: the column 'patient_id' is missing; ISIC 2020 has image_name, patient_id",
    ),
    ("isic2020", dict(GroundTruth_v2=("I_2,", "I_1,")), "row 3: image_id 'I_1' is already in row 2"),
    (
        "isic2020",
        {"train/I_2": None},
        "row 3: there is no image 'I_2' in what was given; give its archive or folder, or remove the row",
    ),
    ("ham10000", dict(metadata=("mel", "mole x")), "row 4: diagnosis 'mole x' is not in label set ham10000"),
    (
        "isic",
        dict(metadata=("Melanoma in situ", "Melanoma metastasis")),
        "row 3: diagnosis 'Melanoma metastasis' (Malignant:Malignant melanocytic proliferations (Melanoma):Melanoma "
        "metastasis) is of no class of label set isic2019",
    ),
    ("isic", dict(metadata=(NEVUS, ",,")), "row 2: the image has no diagnosis; leave such images out"),
    ("isic", dict(metadata=("diagnosis_1", "diagnosis")), "row 1: the column 'diagnosis_1' is missing"),
    ("isic", dict(metadata=("dermoscopic", "RCM: tile")), "none of the 4 images is dermoscopic, they are: RCM: tile"),
    ("isic", dict(metadata=("anterior torso", "anterior trso")), "row 3: site 'anterior trso' is not known"),
    ("isic", {"ISIC_2.jpg": None}, "metadata.csv row 3: there is no image 'ISIC_2' in what was given"),
    ("isic", {"metadata.csv": None}, "no metadata table (a table with the columns isic_id and diagnosis_1"),
    ("ph2", dict(txt=("|               T ||", "||")), "PH2_dataset.txt row 2: 5 cells where the header has 6; restore"),
    (
        "ph2",
        dict(txt=("                  2 ||", "3||")),
        "row 4: diagnosis '3' is not in label set ph2 (common_nevus, atyp",
    ),
    (
        "ph2",
        dict(txt=None),
        "(a table with the columns Name and Clinical Diagnosis, such as PH2_dataset.txt) was given",
    ),
    (
        "derm7pt",
        {"meta.csv": ("clark nevus", "clerk nevus")},
        "row 2: diagnosis 'clerk nevus' is not in label set derm7p",
    ),
    (
        "derm7pt",
        dict(valid_indexes=None),
        "no valid_indexes.csv was given; give it beside test_indexes.csv, train_indexes",
    ),
    ("derm7pt", dict(valid_indexes=("1", "0")), "valid_indexes.csv row 2: row number 0 is in train already; keep one"),
    (
        "derm7pt",
        dict(valid_indexes=("1", "7")),
        "valid_indexes.csv row 2: '7' is no row of the table; allowed are 0 to 2",
    ),
    (
        "padufes20",
        dict(metadata=(",NEV,", ",NEW,")),
        "row 2: diagnosis 'NEW' is not in label set pad-ufes-20 (ak, bcc,",
    ),
    (
        "padufes20",
        dict(metadata=("gender", "sex")),
        "row 1: the column 'gender' is missing; PAD-UFES-20 has img_id, patien",
    ),
    (
        "fitzpatrick17k",
        {"fa2911a9b13b6f8af79cb700937cc14f.jpg": None},
        "there is no image 'fa2911a9b13b6f8af79cb700937cc14f' in what was given",
    ),
    (
        "ddi",
        dict(metadata=("56,True", "56,Tru")),
        "row 2: diagnosis 'Tru' is not in label set ddi (benign, malignant).",
    ),
    (
        "scin",
        dict(labels=("{'Eczema': 0.6, 'Psoriasis': 0.4}", "Eczema")),
        "'Eczema' is no mapping of conditions to weig",
    ),
    (
        "scin",
        dict(cases=("-2,SCIN", "-5,SCIN")),
        "scin_cases.csv row 3: lesion_id '-5' has no row in in/dataset/scin_labe",
    ),
    (
        "milk10k",
        dict(GroundTruth=("IL_1", "IL_2")),
        "GroundTruth.csv row 3: lesion_id 'IL_2' is already in row 2; keep one",
    ),
    ("milk10k", dict(Training_Metadata=None), "no table of details for in/MILK10k_Training_GroundTruth.csv"),
]


@pytest.mark.parametrize("name, edits, message", BAD)
def test_a_fault_is_named_and_leaves_no_folder(tmp_path, name, edits, message):
    files = changed((LAYOUTS | DESCRIBED)[name], **edits)
    source = lay(tmp_path / "in", {n.replace(".zip/", "/"): d for n, d in files.items()})
    with pytest.raises(ValueError) as caught:
        IMPORTERS[name](source, tmp_path / "data")
    assert message in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_all_faults_of_a_table_come_at_once(tmp_path):
    truth = one_hot(NINE, {f"I_{i}": "NV" for i in range(1, 6)}).replace(b"0.0,1.0", b"1.0,1.0")
    source = lay(tmp_path / "in", ISIC2019 | {"ISIC_2019_Training_GroundTruth.csv": truth})
    with pytest.raises(ValueError) as caught:
        SOURCES["isic2019"](source, tmp_path / "data")
    assert len(caught.value.problems) == 5 + 3 + 1 and "ISIC 2019: 9 problems" in str(caught.value)


@pytest.mark.parametrize("name, options, wanted", [
    ("isic2019", dict(label_set="ham10000", word_map=dict(scc="bkl", unk="bkl")), ["nv", "bkl", "akiec", "bkl"]),
    ("isic2019", dict(label_set="ham10000", skip_bad=True), ["nv", "akiec"]),
    ("isic2019", dict(label_set="ham10000", word_map=dict(ak="bkl"), skip_bad=True), ["nv", "bkl"]),
    ("bcn20000", dict(label_set="ham10000", skip_bad=True), ["mel", "mel", "nv"]),
    ("isic2019", dict(label_set="isic2019"), ["nv", "scc", "ak", "unk"]),
    ("ham10000", dict(label_set="melanoma", word_map=dict(nv="benign")), ["benign", "benign", "mel"]),
    ("ham10000", dict(label_set="isic2019"), ["nv", "nv", "mel"])])
def test_a_collection_in_another_label_set(tmp_path, name, options, wanted):
    report = SOURCES[name](lay(tmp_path / "in", (LAYOUTS | DESCRIBED)[name]), tmp_path / "data", **options)
    data = read_dataset(tmp_path / "data")
    assert (data.table.diagnosis.tolist(), data.info.label_set) == (wanted, options["label_set"])
    if "skip_bad" in options:
        assert any("left out: 1 images of class 'scc', not in label set ham10000" == n.lower() for n in report.notes)


def test_a_class_without_a_place_is_named_before_an_image_is_read(tmp_path):
    files = {n: (b"no picture" if n.endswith("jpg") else d) for n, d in ISIC2019.items()}
    with pytest.raises(ValueError, match=r"row 3: class 'scc' has no place in label set ham10000 .*'scc=KNOWN CODE'"):
        SOURCES["isic2019"](lay(tmp_path / "in", files), tmp_path / "data", label_set="ham10000")
    with pytest.raises(ValueError, match="label set 'ham1000' is not built in"):
        SOURCES["isic2019"](tmp_path / "nowhere", tmp_path / "data", label_set="ham1000")


@pytest.mark.parametrize("name, given, message", [
    ("isic2018", "isic2019", "What was given is of isic2019: skinlesion import isic2019"),
    ("isic2019", "isic", "What was given is of isic: skinlesion import isic"),
    ("isic", "isic2019", "What was given is of isic2019: skinlesion import isic2019"),
    ("isic", "milk10k", "What was given is of milk10k: skinlesion import milk10k"), # it has a column isic_id too
    ("isic2020", "ham10000", "What was given is of ham10000: skinlesion import ham10000"),
    ("ham10000", "isic2020",
     "no metadata table (a table with the columns image_id and dx, such as HAM10000_metadata.csv) was given")])
def test_a_collection_under_another_name(tmp_path, name, given, message):
    with pytest.raises(ValueError) as caught:
        IMPORTERS[name](lay(tmp_path / "in", (LAYOUTS | DESCRIBED)[given]), tmp_path / "data")
    assert message in str(caught.value) and not (tmp_path / "data").exists()


def test_a_table_whose_part_is_not_known(tmp_path):
    files = {("truth.csv" if n.endswith("Training_GroundTruth.csv") else n): d for n, d in ISIC2019.items()}
    with pytest.raises(
        ValueError,
        match="truth.csv: the name does not say which part of ISIC 2019 it is; it must hold one of train, test",
    ):
        SOURCES["isic2019"](lay(tmp_path / "in", files), tmp_path / "data")


def test_words_that_are_mapped(tmp_path):
    files = changed(HAM, metadata=("mel", "Melanom"))
    files["HAM10000_metadata.csv"] = files["HAM10000_metadata.csv"].replace(b"male", b"M\xc3\xa4nnlich")
    source = lay(tmp_path / "in", files)
    words = {"melanom": "mel", "MÄNNLICH": "male"}
    report = SOURCES["ham10000"](source, tmp_path / "data", word_map=words)
    assert report.mapped == {"melanom=mel": 1, "MÄNNLICH=male": 2} and "words mapped: melanom=mel in 1 cells" in str(
        report
    )
    assert read_dataset(tmp_path / "data").table.sex.tolist() == ["male", "male", ""]
    for wrong, message in (
        (
            words | {"melanon": "mel"},
            "the word 'melanon' stands nowhere in diagnosis, site or sex. Did you mean 'Melanom'?",
        ),
        (words | {"back": "bakc"}, "site 'bakc' is not known"),
    ):
        with pytest.raises(ValueError) as caught:
            SOURCES["ham10000"](source, tmp_path / "other", word_map=wrong)
        assert message in str(caught.value) and not (tmp_path / "other").exists()


def test_skip_bad_says_what_it_left_out(tmp_path):
    files = ISIC2018 | {"ISIC2018_Task3_Training_Input.zip/ISIC2018_Task3_Training_Input/I_2.jpg": picture(2)[:300]}
    source = lay(tmp_path / "in", PACKINGS["zip_of_zips"](files))
    with pytest.raises(
        ValueError,
        match="row 3: all.zip/ISIC2018_Task3_Training_Input.zip/ISIC2018_Task3_Training_Input/I_2.jpg: truncated",
    ):
        SOURCES["isic2018"](source, tmp_path / "data")
    report = SOURCES["isic2018"](source, tmp_path / "data", skip_bad=True)
    assert report.n_images == 4 and len(report.skipped) == 1 and report.classes["mel"] == 1


def test_an_older_dataset_survives_a_failed_import(expected, tmp_path):
    shutil.copytree(expected[0] / "isic2020", tmp_path / "data")
    before = sums(tmp_path / "data")
    with pytest.raises(ValueError):
        SOURCES["isic2020"](lay(tmp_path / "in", changed(ISIC2020, **{"train/I_2": None})), tmp_path / "data")
    with pytest.raises(FileExistsError, match="holds the dataset 'ISIC 2020'"):
        SOURCES["ham10000"](lay(tmp_path / "ham", HAM), tmp_path / "data")
    assert sums(tmp_path / "data") == before


def test_links_in_a_folder(tmp_path):
    source = lay(tmp_path / "in", HAM)
    (source / "more").symlink_to(tmp_path)
    with pytest.raises(
        ValueError, match="more: it is a link to a folder, which is not followed; give that folder itself"
    ):
        SOURCES["ham10000"](source, tmp_path / "data")
    (source / "more").unlink()
    (source / "I_9.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(ValueError, match="I_9.jpg: it is a link to nothing"):
        SOURCES["ham10000"](source, tmp_path / "data")


def fuzz(tmp_path, archive, name, places):
    "Every broken archive is read all the same, or refused by name; nothing is left."
    source = tmp_path / "in"
    out = tmp_path / "data"
    source.mkdir()
    (source / "HAM10000_metadata.csv").write_bytes(HAM["HAM10000_metadata.csv"])
    for at, broken in places:
        (source / name).write_bytes(broken)
        try:
            SOURCES["ham10000"](source, out)
        except ValueError as e:
            assert name in str(e) or "there is no image" in str(e) or "points outside" in str(e), (at, e)
        assert {p.name for p in tmp_path.iterdir()} <= {"in", "data"}, at


def flips(data, step):
    return [(at, data[:at] + bytes([data[at] ^ 0xff]) + data[at + 1:]) for at in range(0, len(data), step)]


IMAGES = {n.split("/")[-1]: d for n, d in HAM.items() if n.endswith(".jpg")}


@pytest.mark.parametrize("name, data", [
    ("x.zip", in_zip(IMAGES)),
    ("x.tar", in_tar(IMAGES)),
    ("x.tgz", in_tar(IMAGES, "w:gz")),
    ("y.zip", in_zip({"x.tar.xz": in_tar(IMAGES, "w:xz")}))])
def test_damaged_archives(tmp_path, name, data):
    "A few of the bytes; `slow` does the rest."
    fuzz(tmp_path, data, name, flips(data, len(data) // 5) + [(k, data[:len(data) * k // 4]) for k in range(4)])


@pytest.mark.slow
@pytest.mark.parametrize("name, data", [
    ("x.zip", in_zip(IMAGES)),
    ("x.tar", in_tar(IMAGES)),
    ("x.tgz", in_tar(IMAGES, "w:gz"))])
def test_every_kind_of_damage(tmp_path, name, data):
    fuzz(tmp_path, data, name, flips(data, len(data) // 50) + [(k, data[:len(data) * k // 20]) for k in range(20)])


@real
def test_real_isic2019(tmp_path):
    "A hundred rows of the real tables with the real images."
    for table in ("GroundTruth", "Metadata"):
        lines = (REAL / "isic2019" / f"ISIC_2019_Training_{table}.csv").read_text().splitlines(True)
        (tmp_path / f"ISIC_2019_Training_{table}.csv").write_text("".join([lines[0], *lines[6900:7000]]))
    report = SOURCES["isic2019"]([REAL / "ham10000", *tmp_path.glob("*.csv")], tmp_path / "data")
    assert (
        report.n_images == report.n_masks == 100
        and sum(report.classes.values()) == 100
        and len(report.images_without_row) == 2 * 6964
    )


@real
def test_real_isic2020(tmp_path):
    report = SOURCES["isic2020"](REAL / "isic2020", tmp_path / "data")
    assert (report.n_images, report.n_patients, report.classes) == (115, 13, dict(benign=104, mel=11))
    table = read_dataset(tmp_path / "data").table
    assert (table.diagnosis == "mel").equals(table.target == "1") and set(table.site) == {
        "trunk",
        "lower extremity",
        "upper extremity",
        "head/neck",
    }


# ---- fetching, from a server on this machine


CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()


@contextmanager
def server(answer):
    "`answer(handler, start)` sends one answer; yields the address and the first bytes that were asked for."
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(int((self.headers["Range"] or "bytes=0-")[6:-1]))
            answer(self, asked[-1])

        def log_message(self, *args):
            pass
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/part.zip", asked
    finally:
        running.shutdown()
        running.server_close()


def send(handler, start, content=CONTENT, upto=None, tag='"1"', kind="application/zip"):
    "The content from `start`, cut off at `upto`."
    handler.send_response(206 if start else 200)
    for name, value in {"ETag": tag, "Content-Type": kind, "Content-Length": len(content) - start}.items():
        if value:
            handler.send_header(name, str(value))
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    handler.end_headers()
    handler.wfile.write(content[start:upto])


def remote(url, **known):
    return RemoteFile("part.zip", url, **known)


MD5 = hashlib.md5(CONTENT).hexdigest()


def test_a_download_goes_on_after_a_cut(tmp_path):
    seen = []
    with server(lambda h, start: send(h, start, upto=start + 120_000)) as (url, asked):
        with pytest.raises(
            DownloadError, match="part.zip: the connection broke 180,000 bytes before the end. Run it again, it goes on"
        ):
            fetch_file(remote(url), tmp_path, tries=1)
        assert [p.name for p in tmp_path.glob("*.zip")] == []
        path = fetch_file(remote(url, size=300_000, md5=MD5), tmp_path, lambda *state: seen.append(state))
        assert (
            asked == [0, 120_000, 240_000]
            and path.read_bytes() == CONTENT
            and seen[-1] == ("part.zip", 300_000, 300_000)
        )
        assert [p.name for p in tmp_path.iterdir()] == ["part.zip"]
        assert fetch_file(remote(url, md5=MD5), tmp_path) == path and len(asked) == 3


def test_a_server_without_range_sends_all_again(tmp_path):
    def whole(handler, start):
        send(handler, 0, upto=120_000 if len(asked) == 1 else None)
    with server(whole) as (url, asked):
        assert fetch_file(remote(url, md5=MD5), tmp_path).read_bytes() == CONTENT
        assert asked == [0, 120_000]


def test_a_file_that_changed_meanwhile_is_fetched_anew(tmp_path):
    def answer(handler, start):
        if len(asked) == 1:
            return send(handler, 0, upto=1000)
        assert handler.headers["If-Range"] == '"1"'
        send(handler, 0, CONTENT[::-1], tag='"2"')
    with server(answer) as (url, asked):
        assert fetch_file(remote(url), tmp_path).read_bytes() == CONTENT[::-1]


def test_a_part_that_is_whole_already(tmp_path):
    def answer(handler, start):
        handler.send_response(416)
        handler.send_header("Content-Range", f"bytes */{len(CONTENT)}")
        handler.end_headers()
    (tmp_path / "part.zip.part").write_bytes(CONTENT)
    (tmp_path / "part.zip.part.tag").write_text('"1"')
    with server(answer) as (url, asked):
        assert fetch_file(remote(url, md5=MD5), tmp_path).read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == ["part.zip"]


@pytest.mark.parametrize("known, message", [
    (dict(md5="0" * 32), f"its MD5 sum is {MD5} where the publisher's is 000"),
    (dict(size=9), "offers 300,000 bytes where 9 are known; the file has")])
def test_a_download_that_is_not_the_file(tmp_path, known, message):
    with server(send) as (url, asked), pytest.raises(DownloadError) as caught:
        fetch_file(remote(url, **known), tmp_path)
    assert message in str(caught.value) and not [*tmp_path.iterdir()]


def test_answers_that_are_no_file(tmp_path):
    for code, message in (
        (404, "answers 404 (it is not there any more)"),
        (403, "answers 403 (the publisher does not give it out)"),
    ):
        with server(lambda h, start: h.send_error(code)) as (url, asked), pytest.raises(DownloadError) as caught:
            fetch_file(remote(url), tmp_path)
        assert (
            message in str(caught.value)
            and "fetch it by hand and give it to the import" in str(caught.value)
            and asked == [0]
        )
    with (
        server(lambda h, start: send(h, 0, b"<html>", kind="text/html")) as (url, _),
        pytest.raises(DownloadError, match="a web page came instead"),
    ):
        fetch_file(remote(url), tmp_path)
    with server(lambda h, start: h.send_error(503) if len(asked) == 1 else send(h, start)) as (url, asked):
        assert fetch_file(remote(url), tmp_path).read_bytes() == CONTENT  # a server that is busy is asked again


def test_no_connection_and_no_room(tmp_path):
    with server(send) as (url, _):
        pass
    with pytest.raises(
        DownloadError,
        match="part.zip: the publisher's server cannot be reached .* fetch http://.* by hand and give the file",
    ):
        fetch_file(remote(url), tmp_path, tries=2)
    free = shutil._ntuple_diskusage(10, 5, 5)
    with server(send) as (url, _), mock.patch.object(downloads.shutil, "disk_usage", return_value=free):
        with pytest.raises(
            DownloadError, match="300,000 bytes are needed for part.zip and 5 are free; free some space"
        ):
            fetch_file(remote(url), tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.name == "part.zip"]


def test_only_what_is_left_needs_room(tmp_path):
    "After a cut at 120,000 of 300,000 bytes, room for 180,000 is enough."
    room = SimpleNamespace(free=180_000)
    with server(lambda h, start: send(h, start, upto=None if start else 120_000)) as (url, _):
        with pytest.raises(DownloadError, match="180,000 bytes before the end"):
            fetch_file(remote(url), tmp_path, tries=1)
        with mock.patch.object(downloads.shutil, "disk_usage", return_value=SimpleNamespace(free=179_999)):
            with pytest.raises(DownloadError, match="180,000 bytes are needed"):
                fetch_file(remote(url), tmp_path)
        with mock.patch.object(downloads.shutil, "disk_usage", return_value=room):
            assert fetch_file(remote(url), tmp_path).read_bytes() == CONTENT


def test_a_download_that_never_began_leaves_no_folder(tmp_path):
    with server(send) as (url, _):
        pass
    c = replace(COLLECTIONS["isic2020"], files=(remote(url),))
    with mock.patch.dict(COLLECTIONS, isic2020=c), mock.patch.object(downloads.time, "sleep"):
        message = r"the publisher's server cannot be reached \(Connection refused\)\. Run it again, it goes on"
        with pytest.raises(DownloadError, match=message):
            download_source("isic2020", tmp_path / "new")
        assert not (tmp_path / "new").exists()
        lay(tmp_path / "old", {"notes.txt": b"mine"})
        with pytest.raises(DownloadError):
            download_source("isic2020", tmp_path / "old")
    assert [p.name for p in (tmp_path / "old").iterdir()] == ["notes.txt"]


def test_a_source_is_fetched_and_imported(tmp_path):
    files = packed(HAM, in_zip)
    with server(lambda h, start: send(h, start, files[h.path[1:]])) as (url, _):
        root = url.rsplit("/", 1)[0]
        c = replace(COLLECTIONS["ham10000"], files=tuple(RemoteFile(n, f"{root}/{n}") for n in files))
        with mock.patch.dict(COLLECTIONS, ham10000=c):
            got = download_source("ham10000", tmp_path / "in")
    assert SOURCES["ham10000"](got, tmp_path / "data").n_images == 3
    fetched = {name: c.files for name, c in COLLECTIONS.items() if c.files}
    assert {"ham10000", "isic2018", "isic2019", "isic2020"} <= set(fetched)
    for files in fetched.values():  # every address is one of the publisher's, every file has a name of its own
        assert all(f.url.startswith("https://") for f in files) and len({f.name for f in files}) == len(files)
    with pytest.raises(ValueError, match="'folder' offers no plain files; choose one of ham10000, isic2018"):
        download_source("folder", tmp_path)
